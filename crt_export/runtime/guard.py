"""Who may use a session now: nobody else at the same time, nobody after it was closed or a call failed."""

from __future__ import annotations

import threading
from types import TracebackType

from crt_export.errors import InputError
from crt_export.runtime.decoder import Decoder


class Guard:
    """The only way to a session's decoder."""

    def __init__(self, decoder: Decoder) -> None:
        """Guard a new decoder."""
        self._decoder: Decoder | None = decoder
        self._failure = ""
        self._closing = False
        self._lock = threading.Lock()

    @property
    def decoder(self) -> Decoder:
        """The decoder, to look at what a running call does not tear.

        Raises:
            InputError: The session is closed.
        """
        if self._decoder is None:
            raise _closed()
        return self._decoder

    def exclusive(self, *, poisoned: bool = False) -> _Exclusive:
        """One call at a time; gives the decoder.

        Args:
            poisoned: Also after a failure: the call lifts it.

        Raises:
            InputError: On entering: the session is closed, poisoned, or busy.
        """
        return _Exclusive(self, poisoned)

    def poisoning(self, decoder: Decoder) -> _Poisoning:
        """Run what changes tensors; if it fails, poison the session and clear what it left."""
        return _Poisoning(self, decoder)

    def enter(self, poisoned: bool) -> Decoder:
        """Take the session for one call; leave() gives it back."""
        if not self._lock.acquire(blocking=False):
            if self._closing:  # whoever holds the lock: no later call will be let in
                raise _closed()
            raise InputError(
                "this session is busy with a call of another thread; use one session per thread, or a lock"
            )
        try:
            if self._closing:
                raise _closed()
            decoder = self.decoder
            if self._failure and not poisoned:
                raise InputError(
                    f"an earlier call of this session failed ({self._failure}); "
                    "call reset() or restore() before going on"
                )
        except InputError:
            self._lock.release()
            raise
        return decoder

    def leave(self) -> None:
        """The call has ended."""
        self._lock.release()

    def poison(self, error: BaseException) -> None:
        """The content is not to be trusted any more."""
        self._failure = str(error).splitlines()[0] if str(error) else type(error).__name__

    def lift(self) -> None:
        """The content is sound again."""
        self._failure = ""

    def close(self) -> None:
        """Let no further call in, and go of the decoder as soon as no call runs."""
        self._closing = True
        with self._lock:
            self._decoder = None


def _closed() -> InputError:
    return InputError("this session is closed; open another with bundle.session()")


# Classes, not generators: a step enters both, and a generator takes three times as long.
class _Exclusive:
    def __init__(self, guard: Guard, poisoned: bool) -> None:
        self._guard = guard
        self._poisoned = poisoned

    def __enter__(self) -> Decoder:
        return self._guard.enter(self._poisoned)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.leave()


class _Poisoning:
    def __init__(self, guard: Guard, decoder: Decoder) -> None:
        self._guard = guard
        self._decoder = decoder
        self._position = decoder.position.copy()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # an interrupt leaves tensors half-written too
            self._guard.poison(error)
            self._decoder.abandon(self._position)
