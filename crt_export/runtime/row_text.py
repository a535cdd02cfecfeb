"""The new text of one row: ids decoded to whole characters, searched for stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from crt_export.runtime.stops import StopMatcher
from crt_export.tokenizer import Tokenizer


class RowText:
    """Grows with every token; without a tokenizer it stays empty."""

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str]) -> None:
        """Start with no text."""
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._stops = StopMatcher(stop_strings)
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """What was given out so far."""
        return "".join(self._parts)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text; None while there is none."""
        return self._stops.found

    def push(self, token: int) -> str:
        """Take a token; the text that it completes and that no stop string can claim any more."""
        return "" if self._stream is None else self._give(self._stops.push(self._stream.push(token)))

    def finish(self) -> str:
        """The row has ended: the rest of its text, U+FFFD for bytes that never became a character.

        That rest is searched too; it ends before a stop string.
        """
        if self._stream is None or self._stops.found is not None:
            return ""
        return self._give(self._stops.push(self._stream.finish()) + self._stops.finish())

    def _give(self, piece: str) -> str:
        if piece:
            self._parts.append(piece)
        return piece
