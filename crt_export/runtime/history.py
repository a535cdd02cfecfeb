"""What sampling has to remember about every row, so that a generation can go on exactly where it ended.

Part of a session and of its snapshots: without it a resumed generation would draw other random numbers, forget
what the repetition penalty is about, or lose the token that was drawn last and not yet fed to the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NO_TOKEN = -1


class History:
    """Draws, pending token and seen tokens of the rows of a session.

    Attributes:
        drawn: Random draws of each row so far, the counter of its next one; int64 [batch]. Greedy choices
            count too.
        pending: Token that was drawn and kept but not fed yet, ``NO_TOKEN`` for none; int64 [batch].
        seen: 1 for every token that was fed to the row or drawn and kept, what the repetition penalty is
            about; uint8 [batch, vocab].
    """

    def __init__(self, batch: int, vocab_size: int) -> None:
        """An empty history."""
        self.drawn = np.zeros(batch, np.int64)
        self.pending = np.full(batch, NO_TOKEN, np.int64)
        self.seen = np.zeros((batch, vocab_size), np.uint8)

    def feed(self, row: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Tokens went into the model: they are seen, and nothing is pending in that row any more.

        Args:
            row: Row of the batch.
            tokens: Ids within the vocabulary; none at all changes nothing.
        """
        if len(tokens) == 0:
            return
        # One token is what every step feeds, and an index costs less than an array of one.
        self.seen[row, tokens[0] if len(tokens) == 1 else np.asarray(tokens, np.int64)] = 1
        self.pending[row] = NO_TOKEN

    def draw(self, row: int, token: int, keep: bool) -> None:
        """A token was chosen.

        Args:
            row: Row of the batch.
            token: Its id.
            keep: Whether it becomes part of the row. A stop token does not: it counts as a draw, no more.
        """
        self.drawn[row] += 1
        if keep:
            self.seen[row, token] = 1
            self.pending[row] = token

    def clear(self) -> None:
        """Forget everything, as at the start of a session."""
        self.drawn.fill(0)
        self.pending.fill(NO_TOKEN)
        self.seen.fill(0)

    def copy(self) -> History:
        """An independent history with the same content."""
        other = History(*self.seen.shape)
        other.assign(self)
        return other

    def assign(self, other: History) -> None:
        """Take over the content of a history of the same batch and vocabulary."""
        self.drawn[:] = other.drawn
        self.pending[:] = other.pending
        self.seen[:] = other.seen
