"""A snapshot: everything a session holds, to go on from later: in memory, or in a file that Python and C++ read alike.

The file is safetensors. Its metadata (strings) are ``format`` ("crt-export snapshot"), ``format_version`` ("1"),
``bundle`` (the bundle's identity: SHA-256 of its manifest.json, hex), ``target``, and ``sha256`` over the
little-endian bytes of all tensors in order of their sorted names. Its tensors, and no others:

===================================  =============================  ================================================
``position``                         int64 [batch]                  tokens in the cache of each row
``next_tokens``                      int64 [batch]                  argmax after each row's last token, -1 none
``logits``                           float32 [batch, vocab]         after each row's last token, NaN at position 0
``drawn``                            int64 [batch]                  random draws so far: the counter of the next one
``pending``                          int64 [batch]                  token drawn and not yet fed, -1 none
``seen``                             uint8 [batch, vocab]           1 for tokens the repetition penalty is about
``recent``                           int64 [batch, 1024]            last tokens fed, newest at the end, -1 where there
                                                                    is none or a stop token ended the text
``held``                             int64 [batch]                  characters of the text not given out, because they
                                                                    may become a stop string
``state``, ``state.{name}``          float32 [batch, 1, *shape]     recurrent states, if the model has any
``past_key_values.{i}.key|value``    float32 or float16             cache [batch, heads, length, head_dim];
                                                                    length is the largest position, and entries at
                                                                    and beyond a row's own position are zero
===================================  =============================  ================================================
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crt_export.checked import shown
from crt_export.errors import BundleError, CrtExportError, InputError, problem_list
from crt_export.models.declaration import STATE
from crt_export.runtime.caches import TensorSizes
from crt_export.runtime.history import RECENT_TOKENS
from crt_export.runtime.tensor_file import TensorFileKind, read_tensor_file, tensor_file_bytes
from crt_export.text_stream import TEXT_END
from crt_export.user_files import is_input, kind_of, write_file

#: A session that goes on counts further, and the count must never overflow an int64.
MOST_DRAWS = 2**62


#: Dtype and dims of a session's tensors; equal names are equal sizes, whatever session it is.
_TENSORS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    **dict.fromkeys(("position", "next_tokens", "drawn", "pending", "held"), ("int64", ("batch",))),
    "recent": ("int64", ("batch", RECENT_TOKENS)),
    "logits": ("float32", ("batch", "vocab")),
    "seen": ("uint8", ("batch", "vocab")),
}
_CACHE_NAME = re.compile(r"past_key_values\.([0-9]+)\.(key|value)")
_STATE_NAME = re.compile(r"state(\.[a-z0-9_]+)?")


def _layout(name: str, rank: int) -> tuple[str, tuple[str | int, ...]] | None:
    """Dtype, "cache" for that of caches, and dims of a session's tensor; sizes of each state and cache are its own."""
    cache = _CACHE_NAME.fullmatch(name)
    if cache is not None:
        return "cache", ("batch", f"heads of {cache[1]}", "tokens", f"head_dim of {cache[1]}")
    if _STATE_NAME.fullmatch(name):
        return "float32", ("batch", 1, *(f"{name} {axis}" for axis in range(2, max(rank, 3))))
    return _TENSORS.get(name)


def _tensor_problems(
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    known: Mapping[str | int, int] | None = None,
    cache_dtypes: Sequence[str] = ("float32", "float16"),
) -> list[str]:
    """What no session has; with the sizes and the cache dtype of one, what that session has not."""
    problems = []
    sizes: dict[str | int, int] = dict(known or {})
    for name, (dtype, shape) in found.items():
        layout = _layout(name, sizes.get(f"rank of {name}", len(shape)))
        if layout is None:
            problems.append(f"{name!r:.80} is unknown")
            continue
        dtypes, dims = cache_dtypes if layout[0] == "cache" else layout[:1], layout[1]
        fitting = [
            sizes.setdefault(dim, dim if isinstance(dim, int) else size) for dim, size in zip(dims, shape, strict=False)
        ]
        if dtype not in dtypes or len(shape) != len(dims) or fitting != list(shape):
            wanted = ", ".join(_dim(dim, sizes) for dim in dims)
            problems.append(f"{name} must be {' or '.join(dtypes)} [{wanted}], found {dtype} {list(shape)}")
    return problems


def _dim(dim: str | int, sizes: Mapping[str | int, int]) -> str:
    return str(sizes.get(dim, dim)).partition(" of ")[0]


SNAPSHOT = TensorFileKind(
    format="crt-export snapshot",
    version=1,
    title="a snapshot",
    required=("bundle", "target"),
    problems=_tensor_problems,
)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a session held. Made by ``session.snapshot()``; only a session of the same kind takes it back.

    Attributes:
        bundle: Identity of the bundle.
        target: Name of the target.
        tensors: Name to values, see the module.

    Raises:
        InputError: An attribute is of another type.
    """

    bundle: str
    target: str
    tensors: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        """Check the types; what the values are worth, restore() finds out."""
        problems = [
            f"{name} must be text, found {shown(value)}"
            for name, value in (("bundle", self.bundle), ("target", self.target))
            if not isinstance(value, str)
        ]
        if not isinstance(self.tensors, Mapping):
            problems.append(f"tensors must map names to arrays, found {shown(self.tensors)}")
        if problems:
            raise InputError(problem_list("snapshot; take it with session.snapshot() or Snapshot.load()", problems))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file in one step; a link stays, and what it leads to is replaced.

        Raises:
            InputError: It cannot be written; what was at ``path`` is unchanged.
        """
        final = _checked_path(path, InputError)
        if "\0" in str(final):
            raise InputError(f"cannot write the snapshot {str(final)!r}: a path must not hold a NUL byte")
        if not final.name:  # "", "." or "/"
            raise InputError(
                f"expected a file name to write the snapshot to, such as 'chat.snapshot', found {shown(path)}"
            )
        content = tensor_file_bytes(SNAPSHOT, {"bundle": self.bundle, "target": self.target}, self.tensors)
        try:
            write_file(final, content)
        except OSError as error:
            raise InputError(f"cannot write the snapshot {final}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Read a file and compare its checksum; whether a session can use it, restore() finds out.

        Raises:
            BundleError: It is missing, damaged, no snapshot, or of a newer format version.
        """
        file = _checked_path(path, BundleError)
        if "\0" in str(file):
            raise BundleError(f"expected a snapshot file, found a path with a NUL byte: {str(file)!r}")
        if not is_input(file):
            found = kind_of(file.stat().st_mode) if file.exists() else "nothing"
            raise BundleError(f"expected a snapshot file, found {found}: {file}")
        metadata, tensors = read_tensor_file(SNAPSHOT, file)
        return cls(bundle=metadata["bundle"], target=metadata["target"], tensors=tensors)


def check_snapshot(snapshot: Snapshot, *, bundle: str, target: str, sizes: TensorSizes) -> None:
    """Refuse a snapshot that a session cannot go on from.

    Args:
        snapshot: The snapshot; nothing of it is trusted.
        bundle: Identity of the session's bundle.
        target: The session's target.
        sizes: The session's sizes.

    Raises:
        BundleError: No snapshot, another bundle, target or batch, tensors missing, unknown or of another dtype or
            shape, more tokens than the session's capacity, or values that no session holds. Lists every problem of
            a kind.
    """
    if not isinstance(snapshot, Snapshot):
        raise BundleError(
            f"expected a snapshot of session.snapshot() or Snapshot.load() to restore, found {shown(snapshot)}"
        )
    problems = [*_origin_problems(snapshot, bundle, target)]
    problems = problems or [*_shape_problems(snapshot.tensors, sizes)] or [*_value_problems(snapshot.tensors, sizes)]
    if problems:
        raise BundleError(problem_list("this session cannot restore the snapshot", problems))


def _origin_problems(snapshot: Snapshot, bundle: str, target: str) -> Iterator[str]:
    if snapshot.bundle != bundle:
        yield (
            f"it was taken with the bundle {snapshot.bundle:.16}, this one is {bundle:.16} (SHA-256 of manifest.json): "
            "open the bundle it was taken with"
        )
    if snapshot.target != target:
        yield f"it was taken on target {snapshot.target!r}, this session runs on {target!r}"


def _shape_problems(tensors: Mapping[str, np.ndarray], sizes: TensorSizes) -> Iterator[str]:
    position = tensors.get("position")
    if not isinstance(position, np.ndarray) or position.dtype != np.int64 or position.ndim != 1:
        yield "position must be int64 [batch]"
        return
    if position.size != sizes.batch:
        yield f"it holds {position.size} rows, this session has a batch of {sizes.batch}"
        return
    outside = np.flatnonzero((position < 0) | (position > sizes.capacity)).tolist()
    if outside:
        for row in outside:
            yield f"row {row} holds {position[row]} tokens, this session has a capacity of {sizes.capacity}"
        return
    states = {spec.tensor(STATE): spec for spec in sizes.model.carried.states}
    names = [*_TENSORS, *states, *(f"past_key_values.{name}" for name in sizes.caches)]
    yield from (f"{name} is missing" for name in names if name not in tensors)
    yield from (f"{name} is unknown" for name in tensors if name not in names)
    there = {name: tensors[name] for name in names if name in tensors}
    strange = [name for name, values in there.items() if not isinstance(values, np.ndarray)]
    yield from (f"{name} must be an array, found {type(there[name]).__name__}" for name in strange)
    found = {name: (str(values.dtype), values.shape) for name, values in there.items() if name not in strange}
    known: dict[str | int, int] = {
        "batch": sizes.batch,
        "vocab": sizes.vocab,
        "tokens": int(position.max()),
    }
    for index, cache in enumerate(sizes.model.carried.caches):
        known |= {f"heads of {index}": cache.heads, f"head_dim of {index}": cache.head_dim}
    for name, spec in states.items():
        known |= {f"{name} {axis}": size for axis, size in enumerate(spec.shape, start=2)}
        known[f"rank of {name}"] = 2 + len(spec.shape)
    yield from _tensor_problems(found, known, (sizes.cache_dtype,))


def _value_problems(tensors: Mapping[str, np.ndarray], sizes: TensorSizes) -> Iterator[str]:
    position, vocab = tensors["position"], sizes.vocab
    for row, count in enumerate(position.tolist()):
        for name, values in tensors.items():
            of_row = values[row, :, :count] if name.startswith("past_key_values.") else values[row]
            if count and values.dtype.kind == "f" and not np.isfinite(of_row).all():
                yield f"row {row}: {name} is not finite"
        pending, following, drawn = (int(tensors[name][row]) for name in ("pending", "next_tokens", "drawn"))
        if not -1 <= pending < vocab:
            yield f"row {row}: the pending token {pending} is outside the vocabulary (0 to {vocab - 1}, -1 for none)"
        if count and not 0 <= following < vocab:
            yield f"row {row}: the next token {following} is outside the vocabulary (0 to {vocab - 1})"
        if not 0 <= drawn <= MOST_DRAWS:
            yield f"row {row}: {drawn} random draws, must be 0 to {MOST_DRAWS}"
        if tensors["seen"][row].max() > 1:
            yield f"row {row}: seen must be 0 or 1"
        recent, held = tensors["recent"][row], int(tensors["held"][row])
        if recent.min() < TEXT_END or recent.max() >= vocab:
            yield f"row {row}: a recent token is outside the vocabulary (0 to {vocab - 1}, -1 for none)"
        if held < 0:
            yield f"row {row}: {held} characters held back, must be at least 0"


def _checked_path(path: str | os.PathLike[str], kind: type[CrtExportError]) -> Path:
    try:
        found = Path(path)
        os.fsencode(found)
    except (TypeError, UnicodeError) as error:
        raise kind(f"expected the path of a snapshot file, found {shown(path)} ({error})") from error
    return found
