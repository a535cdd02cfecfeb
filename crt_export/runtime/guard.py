"""Who may use a session now: nobody else at the same time, nobody after it was closed or a call failed.

A call that an exception ends leaves the session untouched or poisoned, whatever the exception and wherever it comes
from: the mark of a poisoning is set before the first change (:meth:`crt_export.runtime.call.Call.begin`) and taken
away after the last, so no handler has to run for it to be there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from crt_export.errors import InputError
from crt_export.exclusive import Busy, Exclusive
from crt_export.runtime.call import Call
from crt_export.runtime.decoder import Decoder
from crt_export.runtime.history import History

_Result = TypeVar("_Result")
_INTERRUPTED = "it was interrupted"


class Guard:
    """The only way to a session's decoder."""

    def __init__(self, decoder: Decoder, history: History) -> None:
        """Guard a new decoder and its history."""
        self._decoder: Decoder | None = decoder
        self._history = history
        self._failure = ""
        self._closing = False
        self._exclusive = Exclusive("this session")

    @property
    def decoder(self) -> Decoder:
        """The decoder, to look at what a running call does not tear.

        Raises:
            InputError: The session is closed.
        """
        if self._decoder is None:
            raise _closed()
        return self._decoder

    def run(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Make a call that has the session to itself.

        Args:
            work: Gets the call, and the arguments.
            *arguments: For it.

        Raises:
            InputError: The session is closed, poisoned, or busy.
        """
        return self._run(False, work, arguments)

    def recover(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """As run(), also after a failure, which it lifts.

        Raises:
            InputError: The session is closed or busy.
        """
        return self._run(True, work, arguments)

    def mark(self) -> None:
        """The content is not whole until the call that changes it has ended."""
        self._failure = _INTERRUPTED

    def close(self) -> None:
        """Let no further call in, and go of the decoder as soon as no call runs.

        Raises:
            InputError: One runs in this very thread. Nothing has changed.
        """
        self._closing = True
        try:
            self._exclusive.wait(self._let_go)
        except InputError:
            self._closing = False
            raise

    def _run(self, poisoned: bool, work: Callable[..., _Result], arguments: tuple[Any, ...]) -> _Result:
        call = Call(self, self.decoder, self._history)
        try:
            return self._exclusive.run(self._alone, call, poisoned, work, arguments)
        except Busy:
            pass
        except BaseException as error:
            # After the last change, and before the caller had the result: it cannot know that there was one.
            if call.begun:
                self._poison(error)
            raise
        if self._closing:  # whoever runs: no later call will be let in
            raise _closed()
        raise InputError("this session is busy with a call of another thread; use one session per thread, or a lock")

    def _alone(self, call: Call, poisoned: bool, work: Callable[..., _Result], arguments: tuple[Any, ...]) -> _Result:
        if self._closing or self._decoder is None:
            raise _closed()
        if self._failure and not poisoned:
            raise InputError(
                f"an earlier call of this session failed ({self._failure}); call reset() or restore() before going on"
            )
        try:
            result = work(call, *arguments)
        except BaseException as error:
            if call.begun:
                self._poison(error)
                call.decoder.abandon(call.position)
            raise
        # The last thing before the result goes back: signals are not looked at between here and the caller.
        self._failure = ""
        return result

    def _poison(self, error: BaseException) -> None:
        self._failure = str(error).splitlines()[0] if str(error) else type(error).__name__

    def _let_go(self) -> None:
        self._decoder = None


def _closed() -> InputError:
    return InputError("this session is closed; open another with bundle.session()")
