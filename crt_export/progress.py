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


class Stages:
    """A progress whose stages are counted: ``stage 3 of 8: export step.onnx``."""

    def __init__(self, progress: Progress, count: int, word: str = "stage") -> None:
        """Count up to ``count``, beginning with the first :meth:`begin`; ``word`` is what is counted."""
        self._progress, self._count, self._word, self._number = progress, count, word, 0

    def begin(self) -> None:
        """Go on to the next stage."""
        self._number += 1

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report progress within the stage."""
        self._progress(f"{self._word} {self._number} of {self._count}: {stage}", done, total)
