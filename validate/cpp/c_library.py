"""The C++ library as Python sees it: a thin layer of ctypes over crt.h, for tests that compare the two languages."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p, sizeof
from pathlib import Path
from typing import Any

import numpy as np

NO_TOKEN = -1


class CrtError(Exception):
    """A call that did not return CRT_OK: the name of its status and crt_last_error()."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


def _options(name: str, **fields: Any) -> Any:
    """crt_NAME: its size, then these fields in their order."""
    return type(name, (ctypes.Structure,), {"_fields_": [("struct_size", c_size_t), *fields.items()]})


BundleOptions = _options("bundle_options", allow_unvalidated=c_int32, identity=c_char_p)
SessionOptions = _options("session_options", batch=c_int64, capacity=c_int64, threads=c_int32, on_full=c_int32)
PrefillOptions = _options("prefill_options", passes=c_int64, chunk=c_int64)
SamplingOptions = _options(
    "sampling_options",
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), c_double),
    top_k=c_int64,
    seed=c_uint32,
)
GenerationOptions = _options(
    "generation_options",
    **dict.fromkeys(("max_new_tokens", "passes"), c_int64),
    sampling=POINTER(SamplingOptions),
    stop_tokens=POINTER(c_int64),
    stop_token_count=c_size_t,
    stop_strings=POINTER(c_char_p),
    stop_string_count=c_size_t,
    ignore_eos=c_int32,
    callback=c_void_p,
    user=c_void_p,
)


class Library:
    """The functions of the library by name; every one that returns a crt_status is checked."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        for name in ("crt_version", "crt_last_error", "crt_status_name", "crt_stop_reason_name"):
            getattr(self._functions, name).restype = c_char_p

    def text(self, name: str, *arguments: Any) -> str:
        """What a function that returns a string says."""
        return getattr(self._functions, name)(*arguments).decode()

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status."""
        status = getattr(self._functions, name)(*arguments)
        if status != 0:
            raise CrtError(self.text("crt_status_name", status), self.text("crt_last_error"))

    def release(self, name: str, handle: c_void_p) -> None:
        """Close or free a handle."""
        function = getattr(self._functions, name)
        function.restype = None
        function(handle)

    def options(self, kind: type[Any], name: str, **values: Any) -> Any:
        """An options struct with its defaults, then these values."""
        options = kind()
        function = getattr(self._functions, f"crt_{name}_init")
        function.restype = None
        function(byref(options), c_size_t(sizeof(options)))
        for field, value in values.items():
            setattr(options, field, value)
        return options

    def bundle(self, path: Path, *, allow_unvalidated: bool = True, identity: bytes | None = None) -> CBundle:
        """Open a bundle."""
        handle = c_void_p()
        options = self.options(BundleOptions, "bundle_options", allow_unvalidated=allow_unvalidated)
        options.identity = identity
        self.call("crt_bundle_open", str(path).encode(), byref(options), byref(handle))
        return CBundle(self, handle)

    def sample_token(
        self, logits: np.ndarray, seen: np.ndarray | None = None, *, row: int = 0, step: int = 0, **sampling: Any
    ) -> int:
        """Draw one token: logits float32 [vocab], seen uint8 [vocab]."""
        options = self.options(SamplingOptions, "sampling_options", **sampling)
        logits = np.ascontiguousarray(logits, np.float32)
        token = c_int64()
        self.call(
            "crt_sample_token",
            logits.ctypes.data_as(c_void_p),
            None if seen is None else np.ascontiguousarray(seen, np.uint8).ctypes.data_as(c_void_p),
            c_size_t(logits.size),
            byref(options),
            c_uint32(row),
            ctypes.c_uint64(step),
            byref(token),
        )
        return token.value


class CBundle:
    """crt_bundle."""

    def __init__(self, library: Library, handle: c_void_p) -> None:
        self.library = library
        self._handle = handle

    def __del__(self) -> None:
        self.library.release("crt_bundle_close", self._handle)

    @property
    def identity(self) -> str:
        """crt_bundle_identity()."""
        identity = c_char_p()
        self.library.call("crt_bundle_identity", self._handle, byref(identity))
        return (identity.value or b"").decode()

    @property
    def targets(self) -> list[str]:
        """crt_bundle_target() of every index."""
        count, name = c_size_t(), c_char_p()
        self.library.call("crt_bundle_target_count", self._handle, byref(count))
        names = []
        for index in range(count.value):
            self.library.call("crt_bundle_target", self._handle, c_size_t(index), byref(name))
            names.append((name.value or b"").decode())
        return names

    def session(self, target: str | None = None, **options: Any) -> CSession:
        """Open a session; options as in crt_session_options."""
        handle = c_void_p()
        values = self.library.options(SessionOptions, "session_options", **options)
        name = None if target is None else target.encode()
        self.library.call("crt_session_open", self._handle, name, byref(values), byref(handle))
        return CSession(self.library, handle)


class CSession:
    """crt_session."""

    def __init__(self, library: Library, handle: c_void_p) -> None:
        self.library = library
        self._handle = handle
        self.batch, self.vocab_size = self._number("crt_session_batch"), self._number("crt_session_vocab_size")

    def __del__(self) -> None:
        self.library.release("crt_session_close", self._handle)

    @property
    def position(self) -> list[int]:
        """Tokens in the cache of each row."""
        values = POINTER(c_int64)()
        self.library.call("crt_session_position", self._handle, byref(values))
        return values[: self.batch]

    @property
    def next_tokens(self) -> list[int]:
        """Argmax after each row's last token."""
        values = POINTER(c_int64)()
        self.library.call("crt_session_next_tokens", self._handle, byref(values))
        return values[: self.batch]

    @property
    def logits(self) -> np.ndarray:
        """float32 [batch, vocab], a copy."""
        values = POINTER(c_float)()
        self.library.call("crt_session_logits", self._handle, byref(values))
        return self._array(values)

    def prefill(self, rows: Sequence[Sequence[int]], *, passes: int = 0, chunk: int = 0) -> np.ndarray:
        """Append tokens to every row."""
        values = POINTER(c_float)()
        options = self.library.options(PrefillOptions, "prefill_options", passes=passes, chunk=chunk)
        self.library.call("crt_session_prefill", self._handle, *_flat(rows), byref(options), byref(values))
        return self._array(values)

    def step(self, tokens: Sequence[int | None]) -> np.ndarray:
        """Append one token per row."""
        values = POINTER(c_float)()
        ids = _ids([NO_TOKEN if token is None else token for token in tokens])
        self.library.call("crt_session_step", self._handle, ids, c_size_t(len(tokens)), byref(values))
        return self._array(values)

    def advance(self, tokens: Sequence[int]) -> None:
        """Append one token per row, without logits."""
        self.library.call("crt_session_advance", self._handle, _ids(tokens), c_size_t(len(tokens)))

    def save(self, path: Path) -> None:
        """Snapshot to a file."""
        snapshot = c_void_p()
        self.library.call("crt_session_snapshot", self._handle, byref(snapshot))
        try:
            self.library.call("crt_snapshot_save", snapshot, str(path).encode())
        finally:
            self.library.release("crt_snapshot_free", snapshot)

    def load(self, path: Path) -> None:
        """Restore a file."""
        snapshot = c_void_p()
        self.library.call("crt_snapshot_load", str(path).encode(), byref(snapshot))
        try:
            self.library.call("crt_session_restore", self._handle, snapshot)
        finally:
            self.library.release("crt_snapshot_free", snapshot)

    def generate(
        self,
        prompts: Sequence[Sequence[int]] = (),
        *,
        sampling: dict[str, Any] | None = None,
        stop_strings: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        **options: Any,
    ) -> CGeneration:
        """Continue every row; options as in crt_generation_options."""
        drawn = self.library.options(SamplingOptions, "sampling_options", **(sampling or {}))
        texts = (c_char_p * len(stop_strings))(*(text.encode() for text in stop_strings))
        values = self.library.options(
            GenerationOptions,
            "generation_options",
            sampling=ctypes.pointer(drawn),
            stop_tokens=_ids(stop_tokens),
            stop_token_count=len(stop_tokens),
            stop_strings=texts,
            stop_string_count=len(stop_strings),
            **options,
        )
        handle = c_void_p()
        self.library.call("crt_session_generate", self._handle, *_flat(prompts), byref(values), byref(handle))
        return CGeneration(self, handle)

    def _number(self, name: str) -> int:
        number = c_int64()
        self.library.call(name, self._handle, byref(number))
        return number.value

    def _array(self, values: Any) -> np.ndarray:
        return np.ctypeslib.as_array(values, (self.batch, self.vocab_size)).copy()


class CGeneration:
    """crt_generation: one list of tokens per turn of the loop, NO_TOKEN for a stopped row."""

    def __init__(self, session: CSession, handle: c_void_p) -> None:
        self._library = session.library
        self._batch = session.batch
        self._handle = handle

    def __del__(self) -> None:
        self._library.release("crt_generation_free", self._handle)

    def __iter__(self) -> Iterator[list[int]]:
        tokens, more = (c_int64 * self._batch)(), c_int32(1)
        while True:
            self._library.call("crt_generation_next", self._handle, tokens, c_size_t(self._batch), byref(more))
            if not more.value:
                return
            yield list(tokens)

    def run(self) -> list[list[int]]:
        """Read to the end; the new tokens of every row."""
        for _ in self:
            pass
        return [self.tokens(row) for row in range(self._batch)]

    def tokens(self, row: int) -> list[int]:
        """New tokens of a row."""
        values, count = POINTER(c_int64)(), c_size_t()
        self._library.call("crt_generation_tokens", self._handle, c_size_t(row), byref(values), byref(count))
        return values[: count.value]

    def text(self, row: int) -> str:
        """New text of a row."""
        return self._text("crt_generation_text", row)

    def rest(self, row: int) -> str:
        """Text of a row that is held back."""
        return self._text("crt_generation_rest", row)

    def _text(self, name: str, row: int) -> str:
        text, size = c_void_p(), c_size_t()
        self._library.call(name, self._handle, c_size_t(row), byref(text), byref(size))
        return ctypes.string_at(text.value or 0, size.value).decode() if size.value else ""

    def stop_reason(self, row: int) -> str:
        """Why a row stopped."""
        reason = c_int32()
        self._library.call("crt_generation_stop_reason", self._handle, c_size_t(row), byref(reason))
        return self._library.text("crt_stop_reason_name", reason)


def _ids(tokens: Sequence[int]) -> Any:
    return (c_int64 * len(tokens))(*tokens)


def _flat(rows: Sequence[Sequence[int]]) -> tuple[Any, Any, c_size_t]:
    """ids, lengths and rows of crt_session_prefill()."""
    return _ids([token for row in rows for token in row]), _ids([len(row) for row in rows]), c_size_t(len(rows))
