"""SIGTERM and SIGHUP as an exception, so that whoever is told to end leaves as Ctrl-C does: nothing unfinished behind.

By default these signals end a process on the spot. A signal that the application handles itself, or was told to ignore
(``nohup``), is left to it. Python gives handlers to the main thread alone, so elsewhere nothing is changed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: What ends a process from outside and can be answered; not every system has both.
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(SystemExit):
    """The process was told to end; its exit code is 128 and the number of the signal, as a shell reports it.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Of a command that this ends."""
        return 128 + self.number


class _Gate:
    """Whether a signal may interrupt what runs now."""

    closed = 0
    waiting: int | None = None


def _handler(number: int, frame: FrameType | None) -> None:
    if _Gate.closed:
        _Gate.waiting = number
    else:
        raise Terminated(number)


@contextmanager
def termination_raises() -> Iterator[None]:
    """Raise :class:`Terminated` in the main thread on a signal whose default would end the process."""
    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _handler)
    try:
        yield
    finally:
        for number in taken:
            if signal.getsignal(number) is _handler:
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def orderly_termination() -> Iterator[None]:
    """For a library: let the block clean up on a signal, then let the signal do what it always did.

    Whoever waits for this process learns that the signal ended it.
    """
    try:
        with termination_raises():
            yield
    except Terminated as ended:
        if signal.getsignal(ended.number) is signal.SIG_DFL:  # no handler of somebody further out has raised it
            os.kill(os.getpid(), ended.number)
        raise


@contextmanager
def not_interrupted() -> Iterator[None]:
    """Hold back a termination while the block cleans up; it is raised at the end."""
    _Gate.closed += 1
    try:
        yield
    finally:
        _Gate.closed -= 1
        if not _Gate.closed and _Gate.waiting is not None:
            number, _Gate.waiting = _Gate.waiting, None
            raise Terminated(number)
