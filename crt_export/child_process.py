"""Run a module of this package in a process of its own: a job on its stdin, an answer on its stdout.

For native code that may crash, and for work that shall go on beside the caller's. Leaving the ``with`` block ends the
process, whatever it was doing: an error or Ctrl-C in the caller leaves no child behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self


@dataclass(frozen=True, kw_only=True)
class ChildEnd:
    """How a child ended.

    Attributes:
        code: Exit status; the negative number of the signal that ended it.
        answer: What it wrote to stdout.
        printed: What it wrote to stderr.
    """

    code: int
    answer: bytes
    printed: str

    def cause_of_death(self) -> str:
        """The status in words, and the last of what was printed on a line of its own each."""
        cause = f"signal {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        tail = "\n".join(self.printed.strip().splitlines()[-10:]) or "it printed nothing"
        return f"{cause}\n{tail}"


class ChildModule:
    """``python -m MODULE`` while the ``with`` block lasts.

    Args:
        module: Its full name; it is the one that would be imported here.
        job: Text for its stdin.
    """

    def __init__(self, module: str, job: str) -> None:
        self._module, self._job = module, job

    def __enter__(self) -> Self:
        """Start it."""
        with ExitStack() as files:
            # Files and no pipes: it never waits for the caller to read, nor the caller for it.
            given, self._answer, self._printed = (files.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            given.write(self._job.encode())
            given.seek(0)
            paths = [str(Path(entry or ".").resolve()) for entry in sys.path]
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=given,
                stdout=self._answer,
                stderr=self._printed,
                # utf-8: the job may hold any path. The paths: the very package that runs here, however it was found.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"},
            )
            self._files = files.pop_all()
        return self

    def wait(self) -> ChildEnd:
        """Wait until it ends."""
        code = self._process.wait()
        content = []
        for file in (self._answer, self._printed):
            file.seek(0)
            content.append(file.read())
        return ChildEnd(code=code, answer=content[0], printed=content[1].decode(errors="replace"))

    def kill(self) -> None:
        """End it at once, from any thread; whoever waits for it sees how it ended."""
        with suppress(ProcessLookupError):
            self._process.kill()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it if it still runs."""
        self.kill()
        self._process.wait()
        self._files.close()


def answer_stream() -> BinaryIO:
    """In the child, once: where its answer goes. Whatever else writes to stdout, native code too, goes to stderr."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(answers, "wb")
