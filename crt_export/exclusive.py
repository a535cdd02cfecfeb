"""Mutual exclusion that no interrupt can leave locked.

An exception may arrive before any instruction of Python code: that of a signal handler (Ctrl-C, ``signal.alarm``), or
one that another thread sets (``PyThreadState_SetAsyncExc``). So a lock that Python code takes and gives back can stay
taken: the exception comes between ``acquire()`` and the ``try`` that follows, or as the first thing in an
``__exit__``. ``contextvars.Context.run()`` enters and leaves in C, with no instruction in between; it refuses to enter
what any thread has entered, and leaves on every exception.

``fork`` copies no other thread, so a call that one of them was making would never leave in the child: there it is over.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextvars import Context
from typing import TypeVar
from weakref import WeakSet

from crt_export.errors import InputError

_Result = TypeVar("_Result")
_REFUSED = "cannot enter context"
_PAUSE_S = 0.001


class Busy(Exception):
    """Another call runs."""


class Exclusive:
    """One call at a time."""

    def __init__(self, what: str) -> None:
        """Let the first call in.

        Args:
            what: What the calls are of, for messages.
        """
        self._what = what
        self._context = Context()  # empty, and never used for variables
        _ALL.add(self)

    def run(self, call: Callable[..., _Result], *arguments: object) -> _Result:
        """Make a call, unless another one runs.

        Raises:
            Busy: Another one runs, in this thread or another one; nothing was called.
        """
        try:
            return self._context.run(call, *arguments)
        except RuntimeError as error:
            # Raised by run() itself, not by what it called.
            if error.__traceback__ is None or error.__traceback__.tb_next is not None or _REFUSED not in str(error):
                raise
            refused = error
        raise Busy from refused

    def wait(self, call: Callable[..., _Result], *arguments: object) -> _Result:
        """Make a call as soon as no other one runs.

        Raises:
            InputError: The one that runs is of this thread (this is a signal handler, say), so it would never end.
        """
        while True:
            try:
                return self.run(call, *arguments)
            except Busy:
                if self._runs_in_this_thread():
                    raise InputError(
                        f"{self._what} is in the middle of a call of this very thread, which a signal handler has "
                        "interrupted; let the call end, or raise an exception in the handler, and do this after it"
                    ) from None
            time.sleep(_PAUSE_S)

    def forget_other_threads(self) -> None:
        """In a forked child: end the call of a thread that is not there."""
        if not self._runs_in_this_thread():
            self._context = Context()

    def _runs_in_this_thread(self) -> bool:
        frame = sys._getframe(1)
        while frame is not None:
            # wait() itself has ended its own run() by now.
            if frame.f_code is Exclusive.run.__code__ and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False


_ALL: WeakSet[Exclusive] = WeakSet()


def _in_child() -> None:
    for exclusive in list(_ALL):
        exclusive.forget_other_threads()


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_in_child)
