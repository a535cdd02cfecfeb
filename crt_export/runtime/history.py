"""History of the rows of a session: what makes a generation go on exactly where it ended.

It is part of a session and of its snapshots. Without it a resumed generation would draw other random numbers, forget
what the repetition penalty is about, lose the token that was drawn last and not yet fed to the model, or begin its text
as if nothing stood before it: without its first space, or with half a character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from crt_export.text_stream import TEXT_END

NO_TOKEN = -1
#: Tokens of a row that are kept as the context of its text. A character needs a few, a run of byte-fallback tokens,
#: which the tokenizers library decodes as a whole, all of its own.
RECENT_TOKENS = 1024


class History:
    """Draws, pending token, seen tokens and text context of the rows of a session.

    Attributes:
        drawn: Random draws of each row so far, the counter of its next one; int64 [batch]. Greedy choices
            count too.
        pending: Token that was drawn and kept but not fed yet, ``NO_TOKEN`` for none; int64 [batch].
        seen: 1 for every token that was fed to the row or drawn and kept, what the repetition penalty is
            about; uint8 [batch, vocab].
        recent: Last tokens that were fed to the row, the newest at the end, TEXT_END in front of the first and where a
            stop token ended the row's text; int64 [batch, RECENT_TOKENS].
        held: Characters at the end of the row's text that were not given out, because they may become a stop string;
            int64 [batch]. Bytes that are no character yet do not count, recent has them.
    """

    #: The attributes, which are also the names of a snapshot's tensors.
    NAMES = ("drawn", "pending", "seen", "recent", "held")

    def __init__(self, batch: int, vocab_size: int) -> None:
        """An empty history."""
        self.drawn = np.zeros(batch, np.int64)
        self.pending = np.full(batch, NO_TOKEN, np.int64)
        self.seen = np.zeros((batch, vocab_size), np.uint8)
        self.recent = np.full((batch, RECENT_TOKENS), TEXT_END, np.int64)
        self.held = np.zeros(batch, np.int64)

    def feed(self, row: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Tokens went into the model: they are seen, and nothing is pending in that row any more.

        Tokens other than the pending one are not of the row's generated text: what of that was held back never comes.

        Args:
            row: Row of the batch.
            tokens: Ids within the vocabulary; none at all changes nothing.
        """
        if len(tokens) == 0:
            return
        # One token is what every step feeds, and an index costs less than an array of one.
        self.seen[row, tokens[0] if len(tokens) == 1 else np.asarray(tokens, np.int64)] = 1
        if len(tokens) > 1 or tokens[0] != self.pending[row]:
            self.held[row] = 0
        self.pending[row] = NO_TOKEN
        self._remember(row, tokens)

    def draw(self, row: int, token: int, keep: bool) -> None:
        """A token was chosen.

        Args:
            row: Row of the batch.
            token: Its id.
            keep: Whether it becomes part of the row. A stop token does not: it counts as a draw, and the row's text
                ends.
        """
        self.drawn[row] += 1
        if keep:
            self.seen[row, token] = 1
            self.pending[row] = token
        else:
            self.held[row] = 0
            self._remember(row, (TEXT_END,))

    def clear(self) -> None:
        """Forget everything, as at the start of a session."""
        self.drawn.fill(0)
        self.pending.fill(NO_TOKEN)
        self.seen.fill(0)
        self.recent.fill(TEXT_END)
        self.held.fill(0)

    def tensors(self) -> dict[str, np.ndarray]:
        """A copy of everything, by name."""
        return {name: getattr(self, name).copy() for name in self.NAMES}

    def copy(self) -> History:
        """An independent history with the same content."""
        other = History(*self.seen.shape)
        other.assign(self)
        return other

    def assign(self, other: History) -> None:
        """Take over the content of a history of the same batch and vocabulary."""
        self.restore({name: getattr(other, name) for name in self.NAMES})

    def restore(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take over what tensors() gave."""
        for name in self.NAMES:
            getattr(self, name)[:] = tensors[name]

    def _remember(self, row: int, tokens: Sequence[int] | np.ndarray) -> None:
        recent, count = self.recent[row], min(len(tokens), RECENT_TOKENS)
        recent[:-count] = recent[count:]
        recent[-count:] = tokens[-count:]
