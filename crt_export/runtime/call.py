"""One call of a session: what it changes in the decoder and in the history, it changes in both or poisons them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from crt_export.errors import ContractError, InputError
from crt_export.runtime.decoder import Decoder
from crt_export.runtime.history import NO_TOKEN, History
from crt_export.runtime.rows import step_tokens, token_rows


class Poisonable(Protocol):
    """What a call marks while it changes a session."""

    def mark(self) -> None:
        """Say that the content is not whole."""
        ...


class Call:
    """A call that has the session to itself.

    Attributes:
        decoder: The session's decoder.
        history: The session's history.
        begun: Whether it has changed anything, or was about to.
        position: Tokens in the cache of each row before it changed anything.
    """

    __slots__ = ("_guard", "begun", "decoder", "history", "position")

    def __init__(self, guard: Poisonable, decoder: Decoder, history: History) -> None:
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
