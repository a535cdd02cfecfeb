"""The errors of a chain by tensor, text and step, and the first one that is beyond the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class ChainText:
    """One text that a chain was run on.

    Attributes:
        window: Index of the window of text.
        after_reset: Whether the same buffers had held another text before.
    """

    window: int
    after_reset: bool = False


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Where a chain left the reference first.

    Attributes:
        graph: The graph that delivered it.
        step: Position of the token that was fed.
        text: The text.
        tensor: The first tensor, in the order in which a step computes them.
        error: Largest |difference| over the largest |value|; infinite where it is NaN or infinite.
        limit: What it is held against.
        detail: What was found and expected, where an error alone does not tell.
    """

    graph: str
    step: int
    text: ChainText
    tensor: str
    error: float
    limit: float
    detail: str = ""

    @property
    def place(self) -> str:
        """``step graph at step 12 of window 3``."""
        return (
            f"{self.graph} graph at step {self.step} of window {self.text.window}"
            + ", after a reset" * self.text.after_reset
        )

    @property
    def sentence(self) -> str:
        """What went wrong first, and where."""
        if self.detail:
            return f"{self.place}: {self.tensor} {self.detail}"
        if not math.isfinite(self.error):
            return f"{self.place}: {self.tensor} is NaN or infinite, expected finite values"
        return (
            f"{self.place}: {self.tensor} is off by {self.error:.3g} of its largest |value|, "
            f"expected at most {self.limit:g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The entry of the level's data."""
        return {
            "step": self.step,
            "window": self.text.window,
            "tensor": self.tensor,
            "error": self.error,
            "limit": self.limit,
        }


class ChainErrors:
    """Filled while a chain runs; every array is [texts, steps]."""

    def __init__(
        self,
        tensors: Sequence[str],
        texts: Sequence[ChainText],
        steps: range,
        limit: float,
        *,
        graph: str = "step",
        first_graph: str = "",
    ) -> None:
        """Start with nothing compared.

        Args:
            tensors: Names in the order in which a step computes them.
            texts: What the chain is run on.
            steps: Positions that are compared.
            limit: The most that an error may be.
            graph: The graph that delivers them.
            first_graph: The one that the first position is from, if that is another.
        """
        self._graph, self._first_graph = graph, first_graph or graph
        self.texts, self.steps, self.limit = tuple(texts), steps, limit
        shape = (len(self.texts), len(steps))
        self._errors = {name: np.zeros(shape) for name in tensors}
        self.compared = np.zeros(shape, bool)
        self._details: dict[tuple[str, int, int], str] = {}

    def add(
        self, first: int, step: int, errors: Mapping[str, np.ndarray], details: Mapping[str, Sequence[str]]
    ) -> None:
        """Note one step of some texts.

        Args:
            first: Index of the first text.
            step: Its position.
            errors: Per tensor, one value per text; NaN counts as infinite.
            details: Per tensor, a sentence per text that says more than the error, empty where it does not.
        """
        column = step - self.steps.start
        for name, values in errors.items():
            rows = slice(first, first + len(values))
            self._errors[name][rows, column] = np.where(np.isnan(values), np.inf, values)
            self.compared[rows, column] = True
        for name, sentences in details.items():
            for offset, sentence in enumerate(sentences):
                if sentence:
                    self._details[name, first + offset, step] = sentence

    def largest(self, tensor: str) -> float:
        """Largest error of one tensor."""
        return float(self._errors[tensor].max())

    def first_divergence(self, tensor: str | None = None, *, after_reset: bool = False) -> Divergence | None:
        """The earliest step beyond the limit, there the first tensor and of that the first text.

        Args:
            tensor: Look at this one only.
            after_reset: Look at texts after a reset only.
        """
        wanted = np.array([text.after_reset or not after_reset for text in self.texts])
        names = self._errors if tensor is None else (tensor,)
        found = []
        for order, name in enumerate(names):
            beyond = (self._errors[name] > self.limit) & wanted[:, None]
            if beyond.any():
                found.append((int(beyond.any(axis=0).argmax()), order, name))
        if not found:
            return None
        column, _, name = min(found)
        errors = self._errors[name][:, column]
        # The first text, not the worst: a text after a reset is named only where the fresh ones were right.
        text, step = int(((errors > self.limit) & wanted).argmax()), self.steps[column]
        return Divergence(
            graph=self._graph if column else self._first_graph,
            step=step,
            text=self.texts[text],
            tensor=name,
            error=float(errors[text]),
            limit=self.limit,
            detail=self._details.get((name, text, step), ""),
        )

    def worst(self, *, after_reset: bool = False) -> float:
        """Largest error of any tensor."""
        wanted = [index for index, text in enumerate(self.texts) if text.after_reset or not after_reset]
        return max((float(errors[wanted].max()) for errors in self._errors.values() if wanted), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Per tensor its largest error, the step of it, and the largest error of every step that was compared."""
        done = self.compared.any(axis=0)
        tensors = {}
        for name, errors in self._errors.items():
            by_step = errors.max(axis=0)
            tensors[name] = {
                "largest": float(by_step.max()),
                "step": self.steps[int(by_step.argmax())],
                "by_step": by_step[done].tolist(),
            }
        return tensors
