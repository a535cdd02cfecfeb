"""The new text of one row: ids decoded to whole characters, searched for stop strings.

What may still become a stop string is held back. The result does not depend on how the text is cut. The stop string
that is complete first ends the text; of those complete at the same character the longest one does. The text ends before
its first character.
"""

from __future__ import annotations

from collections.abc import Sequence

from crt_export.text_stream import TEXT_END, TextStream
from crt_export.tokenizer import Tokenizer


class StopMatcher:
    """Passes text on up to the first stop string.

    Attributes:
        found: The stop string that ended the text; None while there is none.
        held: Text that was taken and not passed on: it may become a stop string.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """Look for any of these strings, none of them empty."""
        self.found: str | None = None
        self._stops = tuple(stop_strings)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self.held = ""

    def push(self, text: str) -> str:
        """Take more text.

        Returns:
            What is certain to come before any stop string; empty once one was found.
        """
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        # What is held back begins a stop string as early as one can begin, so none is missed.
        text = self.held + text
        ends = [(begin + len(stop), begin, stop) for stop in self._stops if (begin := text.find(stop)) >= 0]
        if ends:
            _, begin, self.found = min(ends)
            self.held = ""
            return text[:begin]
        keep = self._beginning_of_a_stop(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """No more text comes: what was held back is no stop string."""
        held, self.held = self.held, ""
        return held

    def before_a_stop(self, text: str) -> str:
        """A text that ends, up to the first stop string in it."""
        matcher = StopMatcher(self._stops)
        return matcher.push(text) + matcher.finish()

    def _beginning_of_a_stop(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class RowText:
    """Grows with every token; without a tokenizer it stays empty."""

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str]) -> None:
        """Start with no text, in front of which there is none."""
        self._tokenizer = tokenizer
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._stops = StopMatcher(stop_strings)
        self._parts: list[str] = []
        self._carried = ""

    def go_on(self, context: Sequence[int], held: int) -> None:
        """Start behind other tokens instead.

        Args:
            context: The tokens, the newest at the end; they leave an incomplete character to this text.
            held: How many of the last characters of their text belong to this one.
        """
        if self._tokenizer is not None:
            self._stream, before = _stream_after(self._tokenizer, context, held)
            self._carried = before[max(len(before) - held, 0) :]

    @property
    def text(self) -> str:
        """What was given out so far."""
        return "".join(self._parts)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text; None while there is none."""
        return self._stops.found

    @property
    def held(self) -> int:
        """Characters that were not given out because they may become a stop string."""
        return len(self._carried + self._stops.held)

    @property
    def rest(self) -> str:
        """What finish() would give."""
        if self._stream is None or self._stops.found is not None:
            return ""
        return self._stops.before_a_stop(self._carried + self._stops.held + self._stream.rest)

    def push(self, token: int) -> str:
        """Take a token; the text that it completes and that no stop string can claim any more."""
        if self._stream is None:
            return ""
        carried, self._carried = self._carried, ""
        return self._give(self._stops.push(carried + self._stream.push(token)))

    def finish(self) -> str:
        """The text has ended: its rest, U+FFFD for bytes that never became a character.

        That rest is searched too; it ends before a stop string.
        """
        if self._stream is None or self._stops.found is not None:
            return ""
        carried, self._carried = self._carried, ""
        return self._give(self._stops.push(carried + self._stream.finish()) + self._stops.finish())

    def _give(self, piece: str) -> str:
        if piece:
            self._parts.append(piece)
        return piece


def _stream_after(tokenizer: Tokenizer, context: Sequence[int], held: int) -> tuple[TextStream, str]:
    """A stream behind the context, and at least so many characters in front of it, if there are so many."""
    count = 4 * held  # tokens to read again
    while True:
        begin = max(len(context) - count, 0)
        stream = tokenizer.stream(context[:begin])
        before = "".join(stream.finish() if token == TEXT_END else stream.push(token) for token in context[begin:])
        if begin == 0 or len(before) >= held:
            return stream, before
        count *= 2
