"""A child process that ends when its parent does, whatever ended the parent, SIGKILL included.

The parent holds one end of a pipe, and nobody else does; the child holds the other one. When the parent is gone the
system closes the pipe. On Linux it then kills the child by itself (``O_ASYNC`` with SIGKILL as its signal), in the
middle of a compiler's native code too, where no thread of Python would get its turn; elsewhere a thread of the child
waits for the end of the pipe. ``PR_SET_PDEATHSIG`` would do less: it is tied to the thread that started the child, and
kills it when that thread ends.

Run as ``python -m crt_export.lifeline DESCRIPTOR MODULE``: it ties this process to the pipe, then runs the module as
``python -m MODULE`` would.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Self


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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
    import signal

    leads_a_group = os.getpgrp() == os.getpid()
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpid() if leads_a_group else os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(descriptor, 0)
    if poll.poll(0):  # it was closed before anybody was to be told
        _end()


def _watch(descriptor: int) -> None:
    """Wait in a thread for the end of a pipe that nothing is ever written to."""
    import threading

    def wait() -> None:
        while os.read(descriptor, 1):
            pass
        _end()

    threading.Thread(target=wait, name="crt-export-lifeline", daemon=True).start()


def _end() -> None:
    os._exit(1)


def main() -> None:
    """Tie this process to the pipe in its first argument, then run the module in the second one."""
    import runpy

    tie_to(int(sys.argv[1]))
    module = sys.argv[2]
    del sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
