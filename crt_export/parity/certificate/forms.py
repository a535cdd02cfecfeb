"""What the certificate asks of a form of the model, and PyTorch FP32 as one such form.

A form is a target's graphs or the reference. Both are asked the same three things: the recurrence token by token, K
parallel passes for every K, and the recurrence continued from K passes. All start at the start of the windows, each
window as one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from crt_export.parity.reference import STEP, Reference


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """What the recurrence gave for some windows, every token a step.

    Attributes:
        hidden: h of every token, float32 [windows, positions, hidden].
        caches: The caches after the last token by input name, [windows, heads, capacity, head_dim]; of targets only.
        logits: Logits of the step at some positions, float32 [windows, vocab] by position; of targets only.
    """

    hidden: np.ndarray
    caches: Mapping[str, np.ndarray] = field(default_factory=dict)
    logits: Mapping[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Iterate:
    """What one more parallel pass gave; the next one overwrites all of it.

    Attributes:
        hidden: h of every token, float32 [windows, positions, hidden].
        residual: Largest |change of h| in this pass, float32 [windows].
        logits: Logits after the last token, float32 [windows, vocab]; of targets only.
        caches: As in Chain; of targets only.
    """

    hidden: np.ndarray
    residual: np.ndarray
    logits: np.ndarray | None = None
    caches: Mapping[str, np.ndarray] = field(default_factory=dict)


class Form(Protocol):
    """A target or the reference; ``rows`` are windows, passes are counted from 1.

    Attributes:
        vocab: Size of the vocabulary.
    """

    vocab: int

    def chain(self, rows: slice) -> Chain:
        """The recurrence over whole windows."""
        ...

    def iterate(self, rows: slice, tokens: int, passes: Sequence[int]) -> Iterator[Iterate]:
        """Parallel passes over the first ``tokens`` tokens; what stands after each number of ``passes``."""
        ...

    def continued(self, rows: slice, start: int, stop: int, passes: Sequence[int]) -> Iterator[np.ndarray]:
        """For each number of passes over the first ``start`` tokens, h of the steps from there to ``stop``.

        Yields:
            float32 [windows, stop - start, hidden].
        """
        ...

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Logits, float32 [windows, positions, vocab]; the caller keeps the pieces small."""
        ...


class ReferenceForm:
    """PyTorch FP32 on the first windows of the reference."""

    def __init__(self, reference: Reference, windows: int) -> None:
        """Take the reference; its chain is used where it is needed for all windows."""
        self._reference, self._whole = reference, windows == reference.windows.count
        self._ids = torch.from_numpy(reference.windows.inputs[:windows])
        self.vocab = reference.model.config.vocab_size

    @torch.no_grad()
    def chain(self, rows: slice) -> Chain:
        """See Form."""
        if self._whole:
            return Chain(hidden=self._reference.hidden(STEP, 1)[rows].numpy())
        return Chain(hidden=self._reference.model.sequential(self._ids[rows])[0].numpy())

    @torch.no_grad()
    def iterate(self, rows: slice, tokens: int, passes: Sequence[int]) -> Iterator[Iterate]:
        """See Form."""
        ids, hidden = self._ids[rows, :tokens], None
        for done in range(1, max(passes) + 1):
            hidden, _, residual = self._reference.model.unroll(ids, 1, hidden=hidden)
            if done in passes:
                yield Iterate(hidden=hidden.numpy(), residual=residual.numpy())

    @torch.no_grad()
    def continued(self, rows: slice, start: int, stop: int, passes: Sequence[int]) -> Iterator[np.ndarray]:
        """See Form."""
        ids, hidden, model = self._ids[rows], None, self._reference.model
        for done in range(1, max(passes) + 1):
            hidden, carry, _ = model.unroll(ids[:, :start], 1, hidden=hidden)
            if done in passes:
                yield model.sequential(ids[:, start:stop], carry)[0].numpy()

    @torch.no_grad()
    def head(self, hidden: np.ndarray) -> np.ndarray:
        """See Form."""
        return self._reference.model.head(torch.from_numpy(np.ascontiguousarray(hidden))).float().numpy()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest |difference| over the largest |expected|; NaN where either holds one, infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    wide = expected.astype(np.float32, copy=False)
    scale = max(float(np.abs(wide).max(initial=0.0)), float(np.finfo(np.float32).tiny))
    with np.errstate(invalid="ignore"):
        return float(np.abs(found.astype(np.float32, copy=False) - wide).max(initial=0.0)) / scale
