"""Progress of a long operation, as its caller hears of it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then, from the thread that does the work."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report progress.

        Args:
            stage: What is being done, a short phrase; a new phrase starts a new stage.
            done: Units finished, of whatever kind the stage counts.
            total: Units in all; 0 where that is not known.
        """
        ...


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignore the report: the default of every long operation."""
