"""Modules of this package in processes of their own: a job on stdin, an answer on stdout.

For native code that may crash, and for work that shall go on beside the caller's. Leaving the ``with`` block ends the
process, whatever it was doing: an error or Ctrl-C in the caller leaves no child behind, nor does the caller's death
(:mod:`crt_export.lifeline`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from crt_export.lifeline import Lifeline


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

    @property
    def cause(self) -> str:
        """The status in words."""
        return f"signal {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"

    @property
    def last_words(self) -> str:
        """The last lines of what was printed."""
        return "\n".join(self.printed.strip().splitlines()[-10:]) or "it printed nothing"


def start_module(
    module: str,
    lifeline: Lifeline,
    *,
    stdin: BinaryIO | int,
    stdout: BinaryIO | int,
    stderr: BinaryIO,
    environment: Mapping[str, str] = os.environ,
    own_group: bool = False,
) -> subprocess.Popen[bytes]:
    """Start ``python -m MODULE``, the one that would be imported here.

    Args:
        module: Its full name.
        lifeline: Ends it when it is closed.
        stdin: What it reads, as :class:`subprocess.Popen` takes it, and likewise where it writes.
        stdout: Its answers.
        stderr: What it prints.
        environment: Its environment; what it is imported by is added.
        own_group: Whether it leads a process group, where there are any.
    """
    paths = [str(Path(entry or ".").resolve()) for entry in sys.path]
    # utf-8: the job may hold any path. The paths: the very package that runs here, however it was found.
    added = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"}
    # -P: not what lies in the folder it is run in
    command = [sys.executable, "-P", *lifeline.command(module)]
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env={**environment, **added},
        pass_fds=lifeline.descriptors,
        process_group=0 if own_group and os.name == "posix" else None,
    )


class ChildGroup:
    """Children that several threads start and wait for, and that any thread can end all at once, for good."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def start(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Start one more.

        Raises:
            CancelledError: The group was ended.
        """
        with self._lock:
            if self._ended:
                raise CancelledError
            process = start()
            self._running.add(process)
        return process

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        """It has ended."""
        with self._lock:
            self._running.discard(process)

    def end(self) -> None:
        """Kill what runs and let nothing start; whoever waits for a child sees how it ended."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.kill()


#: Of children that only their own block ends.
UNGROUPED = ChildGroup()


class ChildModule:
    """``python -m MODULE`` while the ``with`` block lasts.

    Args:
        module: Its full name; it is the one that would be imported here.
        job: Text for its stdin.
        group: What else ends it.
    """

    def __init__(self, module: str, job: str, group: ChildGroup = UNGROUPED) -> None:
        self._module, self._job, self._group = module, job, group

    def __enter__(self) -> Self:
        """Start it.

        Raises:
            CancelledError: Its group was ended.
        """
        with ExitStack() as files:
            # Files and no pipes: it never waits for the caller to read, nor the caller for it.
            given, self._answer, self._printed = (files.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            given.write(self._job.encode())
            given.seek(0)
            lifeline = files.enter_context(Lifeline())
            self._process = self._group.start(
                lambda: start_module(self._module, lifeline, stdin=given, stdout=self._answer, stderr=self._printed)
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it if it still runs."""
        self._process.kill()  # nothing happens to one that has ended
        self._process.wait()
        self._group.forget(self._process)
        self._files.close()


def answer_stream() -> BinaryIO:
    """In the child, once: where its answer goes. Whatever else writes to stdout, native code too, goes to stderr."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(answers, "wb")
