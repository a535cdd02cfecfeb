"""The guard of a session: nobody else at the same time, nobody after it was closed or a call failed.

A call that an exception ends leaves the session untouched or poisoned, whatever the exception and wherever it comes
from: the mark of a poisoning is set before the first change (:meth:`Call.begin`) and taken away after the last, so no
handler has to run for it to be there. What a call changes in the decoder and in the history, it changes in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from crt_export.errors import ContractError, InputError
from crt_export.exclusive import Busy, Exclusive
from crt_export.runtime.decoder import Decoder
from crt_export.runtime.history import NO_TOKEN, History
from crt_export.runtime.rows import step_tokens, token_rows

_Result = TypeVar("_Result")
_INTERRUPTED = "it was interrupted"


class Call:
    """A call that has the session to itself.

    Attributes:
        decoder: The session's decoder.
        history: The session's history.
        begun: Whether it has changed anything, or was about to.
        position: Tokens in the cache of each row before it changed anything.
    """

    __slots__ = ("_guard", "begun", "decoder", "history", "position")

    def __init__(self, guard: Guard, decoder: Decoder, history: History) -> None:
        """A call that has changed nothing yet."""
        self._guard = guard
        self.decoder = decoder
        self.history = history
        self.begun = False
        self.position: list[int] = []

    def begin(self) -> None:
        """Announce changes: from here on the session is poisoned, until the call has ended as it should."""
        if not self.begun:
            self.position = self.decoder.position.copy()
            self._guard.mark()
            self.begun = True

    def prefill(
        self,
        rows: Sequence[Sequence[int] | np.ndarray],
        passes: int | Literal["adaptive", "exact"] | None = None,
        chunk: int | None = None,
    ) -> np.ndarray:
        """See Session.prefill()."""
        decoder = self.decoder
        tokens = token_rows(rows, batch=decoder.sizes.batch, vocab=decoder.sizes.vocab)
        if not any(row.size for row in tokens):
            raise InputError("empty prompt: prefill needs at least one token in at least one row")
        rule = decoder.prefill_rule(passes, chunk)
        decoder.check_room([row.size for row in tokens])
        self.begin()
        decoder.prefill(tokens, rule)
        logits = decoder.logits()
        for row, fed in enumerate(tokens):
            self.history.feed(row, fed)
        return logits

    def step(self, tokens: Sequence[int | None] | np.ndarray) -> np.ndarray:
        """See Session.step()."""
        self._feed(tokens, read_logits=True)
        return self.decoder.logits()

    def advance(self, tokens: Sequence[int | None] | np.ndarray) -> None:
        """See Session.advance()."""
        self._feed(tokens, read_logits=False)

    def logits(self) -> np.ndarray:
        """Logits after each row's last token, float32 [batch, vocab], a copy; NaN for a row without tokens.

        Raises:
            ContractError: They are not finite, which advance() could not see. Poisons the session.
        """
        try:
            return self.decoder.logits()
        except ContractError:
            self.begin()
            raise

    def next_tokens(self) -> np.ndarray:
        """The engine's likeliest token after each row's last one, int64 [batch]; -1 for a row without tokens."""
        return np.array(self.decoder.next_tokens, np.int64)

    def contents(self) -> dict[str, np.ndarray]:
        """Copies of all that the session holds, under the names of a snapshot.

        Raises:
            ContractError: It cannot be read, or is not finite. Poisons the session.
        """
        try:
            return {**self.decoder.contents(), **self.history.tensors()}
        except ContractError:
            self.begin()
            raise

    def restore(self, contents: Mapping[str, np.ndarray]) -> None:
        """Take everything from checked contents, under the names of a snapshot."""
        tensors = {name: values for name, values in contents.items() if name not in History.NAMES}
        self.begin()
        self.history.restore(contents)
        self.decoder.restore(tensors)

    def reset(self) -> None:
        """Forget every token and draw; zero caches and state."""
        self.begin()
        self.decoder.reset()
        self.history.clear()

    def _feed(self, tokens: Sequence[int | None] | np.ndarray, *, read_logits: bool) -> None:
        decoder = self.decoder
        ids = step_tokens(tokens, batch=decoder.sizes.batch, vocab=decoder.sizes.vocab)
        decoder.check_room([int(token != NO_TOKEN) for token in ids])
        self.begin()
        decoder.step(ids, read_logits=read_logits)
        for row, token in enumerate(ids):
            if token != NO_TOKEN:
                self.history.feed(row, [token])


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
