"""Errors of a chain by tensor, text and step against what the reference gives, and the first one beyond the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from crt_export.models.base import LanguageModel
from crt_export.models.declaration import NEXT_STATE
from crt_export.parity.reference import Trace

_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Where a chain left the reference first.

    Attributes:
        graph: The graph that delivered it.
        step: Position of the token that was fed.
        window: Index of the window of text.
        after_reset: Whether the same buffers had held another text before.
        tensor: The first tensor, in the order in which a step computes them.
        error: Largest |difference| over the largest |value|; infinite where it is NaN or infinite.
        limit: What it is held against.
        detail: What was found and expected, where an error alone does not tell.
    """

    graph: str
    step: int
    window: int
    after_reset: bool
    tensor: str
    error: float
    limit: float
    detail: str = ""

    @property
    def place(self) -> str:
        """``step graph at step 12 of window 3``."""
        return f"{self.graph} graph at step {self.step} of window {self.window}" + ", after a reset" * self.after_reset

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
        return {name: getattr(self, name) for name in ("step", "window", "tensor", "error", "limit")}


class ChainErrors:
    """Filled while a chain runs; every array is [texts, steps]."""

    def __init__(
        self,
        tensors: Sequence[str],
        windows: Sequence[int],
        steps: range,
        limit: float,
        *,
        fresh: int | None = None,
        graphs: tuple[str, str] = ("step", "step"),
    ) -> None:
        """Start with nothing compared.

        Args:
            tensors: Names in the order in which a step computes them.
            windows: Per text the index of its window.
            steps: Positions that are compared.
            limit: The most that an error may be.
            fresh: How many texts come first on their buffers, the others after a reset; None: all of them.
            graphs: The graph that the first position is from, and the one that the others are from.
        """
        self.windows, self.steps, self.limit = tuple(windows), steps, limit
        shape = (len(self.windows), len(steps))
        self._after_reset = np.arange(shape[0]) >= (shape[0] if fresh is None else fresh)
        self._graphs = graphs
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

    def largest(self, tensor: str | None = None, *, after_reset: bool = False) -> float:
        """Largest error of one tensor or of any, of all texts or of those after a reset."""
        wanted = self._wanted(after_reset)
        names = self._errors if tensor is None else (tensor,)
        return max((float(self._errors[name][wanted].max()) for name in names if wanted.any()), default=0.0)

    def first_divergence(self, tensor: str | None = None, *, after_reset: bool = False) -> Divergence | None:
        """The earliest step beyond the limit, there the first tensor and of that the first text.

        Args:
            tensor: Look at this one only.
            after_reset: Look at texts after a reset only.
        """
        wanted = self._wanted(after_reset)
        found = []
        for order, name in enumerate(self._errors if tensor is None else (tensor,)):
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
            graph=self._graphs[min(column, 1)],
            step=step,
            window=self.windows[text],
            after_reset=bool(self._after_reset[text]),
            tensor=name,
            error=float(errors[text]),
            limit=self.limit,
            detail=self._details.get((name, text, step), ""),
        )

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

    def _wanted(self, after_reset: bool) -> np.ndarray:
        return self._after_reset if after_reset else np.ones(len(self.windows), bool)


class ChainReference:
    """What the reference says about a trace, by output name, as numpy arrays.

    Attributes:
        caches: Float32 [texts, heads, steps, head_dim] by output name.
        states: Float32 [texts, steps, *shape] by output name.
        factors: What the target divides the values in a cache by, [heads, 1, head_dim] by output name.
        scales: The largest |value| of every tensor.
        tensors: All outputs, in the order in which a step computes them.
    """

    def __init__(self, model: LanguageModel, trace: Trace, factors: Sequence[np.ndarray]) -> None:
        """Take the caches apart by name.

        Args:
            model: The reference, for logits.
            trace: What it delivered.
            factors: Per cache what the target divides the values in its cache by, [heads, 1, head_dim].
        """
        self.model, self.trace = model, trace
        self.caches: dict[str, np.ndarray] = {}
        self.factors: dict[str, np.ndarray] = {}
        for index, (keys, values, factor) in enumerate(zip(trace.keys, trace.values, factors, strict=True)):
            name = f"present_key_values.{index}"
            self.caches |= {f"{name}.key": keys.numpy(), f"{name}.value": values.numpy()}
            self.factors[f"{name}.value"] = factor
        self.scales = {name: _largest(values) for name, values in self.caches.items()}
        specs = model.carried.states
        self.states = {spec.tensor(NEXT_STATE): trace.states[spec.name].numpy() for spec in specs}
        self.scales |= {name: _largest(values) for name, values in self.states.items()}
        self.scales["logits"] = max(_largest(self.logits(slice(None), step)) for step in range(trace.ids.shape[1]))
        self.tensors = [*self.caches, *self.states, "logits", "next_token", "next_position"]

    @torch.no_grad()
    def logits(self, texts: slice, step: int) -> np.ndarray:
        """Float32 [texts, vocab]."""
        return self.model.head(self.trace.hidden[texts, step]).numpy()


def _largest(values: np.ndarray) -> float:
    return max(float(np.abs(values).max()), _TINY)


def row_errors(found: np.ndarray, expected: np.ndarray, scale: float) -> np.ndarray:
    """Largest |difference| over the scale, per row; NaN stays NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(found - expected)
    return difference.reshape(len(found), -1).max(axis=1).astype(np.float64) / scale


def token_errors(tokens: np.ndarray, logits: np.ndarray, expected: np.ndarray, scale: float) -> np.ndarray:
    """The smallest logit error that explains each token: half the reference's margin, over the scale."""
    inside = (tokens >= 0) & (tokens < logits.shape[1])
    chosen = np.where(inside, tokens, 0)
    rows = np.arange(len(tokens))
    margin = expected.max(axis=1) - expected[rows, chosen]
    # Where logits are NaN they are named themselves, and no token is right or wrong.
    own = ~np.isfinite(logits).all(axis=1) | (logits[rows, chosen] == logits.max(axis=1))
    return np.where(inside & own, margin / (2 * scale), np.inf)


def token_problem(token: int, logits: np.ndarray, expected: np.ndarray) -> str:
    """What is wrong with a token beside the logits, [vocab], that it was chosen by; empty where nothing is."""
    if not 0 <= token < len(logits):
        return f"is {token}, expected an id below {len(logits)}"
    if not np.isfinite(logits).all():
        return ""
    if logits[token] != logits.max():
        return f"is {token}, expected the argmax of logits, {int(logits.argmax())}"
    if token != expected.argmax():
        margin = float(expected.max() - expected[token])
        return f"is {token}, expected {int(expected.argmax())}, whose logit is {margin:.3g} larger in the reference"
    return ""
