"""What an application in C does with a file, every stage of it, and what the programs of the C++ library say."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from ctypes import byref, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from python_probe import CLI_EVERY, MOST_TARGETS, OF_BUNDLES, PROMPT, STEP
from seeds import BUNDLE, CHECKPOINT, SIDECAR, SNAPSHOT, TARGET
from stages import Finding, Stages

sys.path.append(str(Path(__file__).resolve().parents[1] / "cpp"))
from c_library import CrtError, Library  # pyright: ignore[reportMissingImports]  # beside the C++ tests

_SELFTEST_EXIT_CODES = {0, 1, 2, 3}
_SELFTEST_SECONDS = 20


class CppProbe:
    """Tries the inputs of one process; what is sound is opened once."""

    def __init__(self, seeds: Path, library: Path) -> None:
        self._library = Library(library)
        self._sound = self._library.bundle(seeds / BUNDLE)
        self._session = self._sound.session(TARGET, threads=1)
        self._selftest = library.parent / "crt-selftest"
        self._parser = _ParserProgram(library.parent / "fuzz" / "crt_parse_file")
        self._count = 0

    def probe(self, kind: str, folder: Path, ids: list[int]) -> Stages:
        """Run every stage of a kind.

        Raises:
            Finding: Something came out that never may.
        """
        stages = Stages((CrtError,))
        probes: dict[str, Callable[[Stages, Path], object]] = {
            "snapshot": self._snapshot,
            "safetensors": self._checkpoint,
            "sidecar": lambda stages, folder: self._parse(stages, "sidecar", "sidecar", folder / SIDECAR),
            "tokenizer": lambda stages, _: stages.give("decode", self._decoded(ids)),
            "vectors": self._vectors,
            "onnx": self._graphs,
        }
        probes.get(kind, self._bundle)(stages, folder)
        if kind in OF_BUNDLES and kind != "vectors":
            self._count += 1
            if self._count % CLI_EVERY == 0:
                self._selftest_code(folder)
        bad = [stage for stage, reason in stages.reasons.items() if reason.startswith("internal: ")]
        if bad and "out of memory" not in stages.reasons[bad[0]]:
            raise Finding(f"{bad[0]}: {stages.reasons[bad[0]]}")
        return stages

    def _bundle(self, stages: Stages, folder: Path) -> None:
        bundle = stages.run("open", lambda: self._library.bundle(folder / BUNDLE))
        if bundle is None:
            return
        for target in bundle.targets[:MOST_TARGETS]:
            session = stages.run(f"session {target!a}", lambda target=target: bundle.session(target, threads=1))
            if session is None:
                continue
            prefill = stages.run(f"prefill {target!a}", lambda session=session: _finite(session.prefill([PROMPT])))
            if prefill is not None:
                stages.run(f"step {target!a}", lambda session=session: _finite(session.step([STEP])))

    def _graphs(self, stages: Stages, folder: Path) -> None:
        for graph in sorted((folder / BUNDLE / "graphs").glob("*.fp32.onnx")):
            self._parse(stages, f"external {graph.name}", "external_data", graph)
        self._bundle(stages, folder)

    def _snapshot(self, stages: Stages, folder: Path) -> None:
        session = self._session
        self._library.call("crt_session_reset", session._handle)
        before = session.prefill([PROMPT])
        snapshot = stages.run("load", lambda: self._loaded(folder / SNAPSHOT))
        if snapshot is None:
            return
        try:
            stages.run("restore", lambda: self._library.call("crt_session_restore", session._handle, snapshot))
        finally:
            self._library.release("crt_snapshot_free", snapshot)
        if stages.verdicts["restore"] == "refused" and not np.array_equal(session.logits, before):
            raise Finding("restore: a refused snapshot changed the session")
        stages.run("step", lambda: _finite(session.step([STEP])))

    def _checkpoint(self, stages: Stages, folder: Path) -> None:
        """C++ reads no checkpoint, but its reader of safetensors gets the same bytes."""
        snapshot = stages.run("load checkpoint", lambda: self._loaded(folder / CHECKPOINT / "model.safetensors"))
        if snapshot is not None:
            self._library.release("crt_snapshot_free", snapshot)

    def _vectors(self, stages: Stages, folder: Path) -> None:
        stages.give("selftest exit code", self._selftest_code(folder))

    def _selftest_code(self, folder: Path) -> int:
        try:
            ran = subprocess.run(
                [self._selftest, folder / BUNDLE], capture_output=True, timeout=_SELFTEST_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise Finding(f"crt-selftest takes more than {_SELFTEST_SECONDS} s") from None
        if ran.returncode not in _SELFTEST_EXIT_CODES:
            raise Finding(f"crt-selftest: exit code {ran.returncode}: {ran.stderr.decode(errors='replace')[-1500:]}")
        return ran.returncode

    def _parse(self, stages: Stages, stage: str, parser: str, path: Path) -> None:
        stages.verdicts[stage] = self._parser.parse(parser, path)

    def _decoded(self, ids: list[int]) -> str:
        """The ids as text, all at once and through a stream, which must agree."""
        numbers, needed = (c_int64 * len(ids))(*ids), c_size_t()
        call, bundle = self._library.call, self._sound._handle
        call("crt_decode", bundle, numbers, c_size_t(len(ids)), None, c_size_t(0), byref(needed))
        buffer = ctypes.create_string_buffer(needed.value + 1)
        call("crt_decode", bundle, numbers, c_size_t(len(ids)), buffer, c_size_t(len(buffer)), byref(needed))
        whole = buffer.raw[: needed.value].decode()
        pieces, stream, text = [], c_void_p(), c_void_p()
        call("crt_text_stream_new", bundle, byref(stream))
        try:
            for token in ids:
                call("crt_text_stream_push", stream, c_int64(token), byref(text), byref(needed))
                pieces.append(ctypes.string_at(text.value or 0, needed.value).decode())
            call("crt_text_stream_finish", stream, byref(text), byref(needed))
            pieces.append(ctypes.string_at(text.value or 0, needed.value).decode())
        finally:
            self._library.release("crt_text_stream_free", stream)
        if "".join(pieces) != whole:
            raise Finding(f"text stream: gives {''.join(pieces)!r}, crt_decode() {whole!r}")
        return whole

    def _loaded(self, path: Path) -> Any:
        snapshot = c_void_p()
        self._library.call("crt_snapshot_load", str(path).encode(), byref(snapshot))
        return snapshot


class _ParserProgram:
    """The C++ parsers that the C API does not reach on this machine, each file given to a process that stays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: subprocess.Popen[str] | None = None

    def parse(self, parser: str, path: Path) -> str:
        """``accepted`` or ``refused``."""
        if self._process is None:
            self._process = subprocess.Popen(
                [self._path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(f"{parser} {path}\n")
        process.stdin.flush()
        verdict = process.stdout.readline().strip()
        if verdict in ("accepted", "refused"):
            return verdict
        self._process = None
        code = process.wait()
        raise Finding(f"parser {parser}: exit code {code}, {verdict!r}: {process.stderr.read()[-1500:]}")


def _finite(logits: np.ndarray) -> np.ndarray:
    if not np.isfinite(logits).all():
        raise Finding("logits are not finite, and no error says so")
    return logits
