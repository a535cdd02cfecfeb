"""The parent's side of a worker: starts it, asks it, and leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any, Self

from crt_export import errors
from crt_export.errors import BenchError, CrtExportError
from crt_export.lifeline import Lifeline

_LAST_WORDS = 2000


class WorkerProcess:
    """A process of ``crt_export.bench.worker``; closed, it is gone, and whatever it started is gone with it.

    Attributes:
        name: What it runs, for messages.
    """

    def __init__(self, name: str, *, single_threaded_blas: bool = False) -> None:
        """Start it."""
        self.name = name
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        if single_threaded_blas:
            environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
        else:
            environment.pop("OMP_NUM_THREADS", None)  # the number of threads is an option of the benchmark
        self._lifeline = Lifeline()
        self._process = subprocess.Popen(
            # -P: nothing of the current folder is imported
            [sys.executable, "-P", *self._lifeline.command("crt_export.bench.worker")],
            pass_fds=self._lifeline.descriptors,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=environment,
            encoding="utf-8",
            # A group of its own: Ctrl-C reaches the parent alone, which then ends the group, a compiler included.
            process_group=0 if os.name == "posix" else None,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, op: str, **values: Any) -> Any:
        """Send a request and wait for the answer.

        Raises:
            CrtExportError: What the worker raised, of the same type.
            BenchError: It raised anything else, or died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._death()
        answer = json.loads(line)
        if "error" in answer:
            raise _error(self.name, answer["error"]["type"], answer["error"]["message"])
        return answer["result"]

    def close(self) -> None:
        """End it and everything it started, at once; closing twice is harmless."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        self._lifeline.close()
        for stream in (self._process.stdin, self._process.stdout, self._words):
            with contextlib.suppress(OSError, ValueError):  # what was not sent cannot be
                if stream is not None:
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _death(self) -> BenchError:
        code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
        hint = "; most likely it ran out of memory" if code == -9 else ""
        self._words.seek(0)
        words = self._words.read().decode("utf-8", errors="replace").strip()[-_LAST_WORDS:]
        said = f"\nits last words:\n{words}" if words else ""
        return BenchError(f"the process that ran {self.name} died: {how}{hint}{said}")


def _error(name: str, kind: str, message: str) -> CrtExportError:
    """The worker's error again: of the same type where it was a deliberate one."""
    known = {found.__name__: found for found in vars(errors).values() if _deliberate(found)}
    return known[kind](message) if kind in known else BenchError(f"{name} failed: {kind}: {message}")


def _deliberate(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, CrtExportError)
