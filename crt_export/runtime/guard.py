"""Who may use a session now: nobody else at the same time, nobody after it was closed or a call failed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from crt_export.errors import InputError
from crt_export.runtime.decoder import Decoder


class Guard:
    """The only way to a session's decoder."""

    def __init__(self, decoder: Decoder) -> None:
        """Guard a new decoder."""
        self._decoder: Decoder | None = decoder
        self._failure = ""
        self._lock = threading.Lock()

    @property
    def decoder(self) -> Decoder:
        """The decoder, to look at what a running call does not tear.

        Raises:
            InputError: The session is closed.
        """
        if self._decoder is None:
            raise InputError("this session is closed; open another with bundle.session()")
        return self._decoder

    @contextmanager
    def exclusive(self, *, poisoned: bool = False) -> Iterator[Decoder]:
        """One call at a time.

        Args:
            poisoned: Also after a failure: the call lifts it.

        Raises:
            InputError: The session is closed, poisoned, or busy.
        """
        if not self._lock.acquire(blocking=False):
            raise InputError(
                "this session is busy with a call of another thread; use one session per thread, or a lock"
            )
        try:
            decoder = self.decoder
            if self._failure and not poisoned:
                raise InputError(
                    f"an earlier call of this session failed ({self._failure}); "
                    "call reset() or restore() before going on"
                )
            yield decoder
        finally:
            self._lock.release()

    @contextmanager
    def poisoning(self, decoder: Decoder) -> Iterator[None]:
        """Run what changes tensors; if it fails, poison the session and clear what it left."""
        position = decoder.position.copy()
        try:
            yield
        except BaseException as error:  # an interrupt leaves tensors half-written too
            self._failure = str(error).splitlines()[0] if str(error) else type(error).__name__
            decoder.abandon(position)
            raise

    def lift(self) -> None:
        """The content is sound again."""
        self._failure = ""

    def close(self) -> None:
        """Let go of the decoder as soon as no call runs."""
        with self._lock:
            self._decoder = None
