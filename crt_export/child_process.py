"""Modules of this package in processes of their own: a job on stdin, an answer on stdout.

For native code that may crash, and for work that shall go on beside the caller's. Leaving the ``with`` block ends the
process, whatever it was doing: an error or Ctrl-C in the caller leaves no child behind, nor does the caller's death,
SIGKILL included.

For that the parent holds one end of a pipe, and nobody else does; the child holds the other one. When the parent is
gone the system closes the pipe. On Linux it then kills the child by itself (``O_ASYNC`` with SIGKILL as its signal), in
the middle of a compiler's native code too, where no thread of Python would get its turn; elsewhere a thread of the
child waits for the end of the pipe. ``PR_SET_PDEATHSIG`` would do less: it is tied to the thread that started the
child, and kills it when that thread ends.

Run as ``python -m crt_export.child_process DESCRIPTOR MODULE`` it ties this process to the pipe, then runs the module
as ``python -m MODULE`` would.
"""

from __future__ import annotations

import os
import runpy
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


class Lifeline:
    """The parent's end of a pipe; a child that holds the other end ends when this one is closed.

    Where descriptors cannot be handed to a child (Windows) there is no pipe, and the child runs on.
    """

    def __init__(self) -> None:
        # Neither end is inherited, unless a child is given it by name.
        self._ends = os.pipe() if os.name == "posix" else ()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What to give to the child: ``pass_fds`` of :class:`subprocess.Popen`."""
        return self._ends[:1]

    def command(self, module: str) -> list[str]:
        """The arguments of the interpreter that run a module and end it with this process."""
        return ["-m", *([__name__, str(self._ends[0])] if self._ends else []), module]

    def close(self) -> None:
        """End a child that still runs; closing twice is harmless."""
        ends, self._ends = self._ends, ()
        for descriptor in ends:
            os.close(descriptor)


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
            lifeline = Lifeline()
            files.callback(lifeline.close)
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


def tie_to(descriptor: int) -> None:
    """End this process, or its group if it leads one, as soon as nobody holds the pipe's other end any more."""
    os.set_inheritable(descriptor, False)
    try:
        _kill_at_the_end_of(descriptor)
    except (AttributeError, ImportError, OSError):  # another system, or a sandbox that has only the common calls
        _watch(descriptor)


def _kill_at_the_end_of(descriptor: int) -> None:
    """Let Linux do it."""
    import fcntl
    import select

    leads_a_group = os.getpgrp() == os.getpid()
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpid() if leads_a_group else os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(descriptor, 0)
    if poll.poll(0):  # it was closed before anybody was to be told
        os._exit(1)


def _watch(descriptor: int) -> None:
    """Wait in a thread for the end of a pipe that nothing is ever written to."""

    def wait() -> None:
        while os.read(descriptor, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="crt-export-lifeline", daemon=True).start()


def main() -> None:
    """Tie this process to the pipe in its first argument, then run the module in the second one."""
    tie_to(int(sys.argv[1]))
    module = sys.argv[2]
    del sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
