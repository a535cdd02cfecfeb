"""The protocol of a candidate: what a worker process can be asked once it is open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

#: How a prompt is fed: None is the candidate's own choice, a number that many passes, or ``adaptive``, ``exact``.
Passes = int | str | None


@dataclass(frozen=True, kw_only=True)
class CandidateInfo:
    """What the report needs to know of an opened candidate.

    Attributes:
        weight_file: Size in bytes of the file its weights came from; None where there is none.
        weights: Bytes of weights that a step reads; None where that is not known.
        notes: What a reader must know, one sentence each.
    """

    weight_file: int | None
    weights: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """A block of steps.

    Attributes:
        seconds: How long each step took.
        engine: The part of it inside the engine's run call; empty where that is not known.
    """

    seconds: Sequence[float]
    engine: Sequence[float] = field(default_factory=tuple)


class Runner(Protocol):
    """One candidate, its libraries imported; it is opened by open()."""

    def weight_path(self) -> Path | None:
        """The file that open() will read weights from."""
        ...

    def open(self) -> None:
        """Get ready for the first token."""
        ...

    def first_token(self) -> None:
        """Feed one token to every row of what open() made, and wait for the logits."""
        ...

    def info(self) -> CandidateInfo:
        """What the report needs to know; after open()."""
        ...

    def steps(self, position: int, warmups: int, count: int) -> StepTimes:
        """Feed tokens one at a time, each the likeliest after the one before.

        Args:
            position: Tokens in the cache before the first one that is timed.
            warmups: Steps before that.
            count: Steps that are timed.
        """
        ...

    def prefill(self, tokens: int, passes: Passes) -> float:
        """Feed a prompt to empty caches; the seconds until its last logits are there.

        Raises:
            UnsupportedError, InputError: The candidate has no such method.
        """
        ...

    def open_second_session(self) -> None:
        """Open another session on the same weights, and feed it one token."""
        ...

    def close_second_session(self) -> None:
        """Close it again."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


def block_start(position: int, warmups: int) -> int:
    """Where the caches stand before the warm-up steps that lead to a position."""
    return max(0, position - warmups)
