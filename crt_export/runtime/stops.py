"""Finds stop strings in text that arrives in pieces, and holds back what may still become one.

The result does not depend on how the text is cut. The stop string that is complete first ends the text; of those
complete at the same character the longest one does. The text ends before its first character.
"""

from __future__ import annotations

from collections.abc import Sequence


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
