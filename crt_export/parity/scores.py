"""Compare logits piece by piece; keep a few numbers per token and never all logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crt_export.parity.reference import Reference, first_position


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What was measured at every window and position, arrays [windows, positions]; NaN where nothing was.

    Attributes:
        start: Position in the window of the first column.
        nll: Negative log-likelihood of the next token, nats, float64.
        reference_nll: The reference's.
        kl: Kullback-Leibler divergence of the reference's distribution from this one, nats.
        largest_error: Largest |logit difference|.
        mean_error: Mean |logit difference| over the vocabulary.
        spread: Standard deviation of the reference's logits over the vocabulary.
        margin: Distance of the reference's two best logits.
        agrees: 1.0 where both have the same best token, else 0.0.
        vocab: Size of the vocabulary.
    """

    start: int
    vocab: int
    nll: np.ndarray
    reference_nll: np.ndarray
    kl: np.ndarray
    largest_error: np.ndarray
    mean_error: np.ndarray
    spread: np.ndarray
    margin: np.ndarray
    agrees: np.ndarray

    @property
    def compared(self) -> np.ndarray:
        """Which tokens were compared, bool [windows, positions]; a comparison that gave NaN does count."""
        return ~np.isnan(self.margin)

    @property
    def better_than_chance(self) -> bool:
        """Whether the reference predicts this text better than a uniform guess would."""
        return float(self.reference_nll.mean()) < math.log(self.vocab)


class Scorer:
    """Takes the logits of a regime in any order and pieces and compares them with the reference's."""

    def __init__(self, reference: Reference, regime: str, passes: int) -> None:
        """Compare ``regime`` with ``passes`` parallel passes."""
        self.reference, self.regime, self.passes = reference, regime, passes
        self.start = first_position(regime, reference.windows.length)
        shape = (reference.windows.count, reference.windows.length - self.start)
        names = ("nll", "reference_nll", "kl", "largest_error", "mean_error", "spread", "margin", "agrees")
        self._arrays = {name: np.full(shape, np.nan) for name in names}
        self._targets = torch.from_numpy(reference.windows.targets)
        self.problems: list[str] = []

    def add(self, windows: slice, position: int, logits: np.ndarray | Tensor) -> None:
        """Compare one piece.

        Args:
            windows: Which windows.
            position: Index in the window of the first token.
            logits: float32 [windows, positions, vocab]; the caller has checked dtype and shape against the contract.
        """
        found = torch.as_tensor(logits)
        positions = slice(position, position + found.shape[1])
        expected = self.reference.logits(self.regime, self.passes, windows, positions)
        targets = self._targets[windows, positions].unsqueeze(-1)
        self._note_non_finite(found, windows, position)
        columns = slice(positions.start - self.start, positions.stop - self.start)
        for name, values in _token_scores(found, expected, targets).items():
            self._arrays[name][windows, columns] = values.numpy()

    def scores(self) -> Scores:
        """Everything compared so far."""
        return Scores(start=self.start, vocab=self.reference.model.config.vocab_size, **self._arrays)

    def _note_non_finite(self, found: Tensor, windows: slice, position: int) -> None:
        bad = ~torch.isfinite(found).all(dim=-1)
        if bad.any() and not self.problems:
            window, offset = (int(index) for index in bad.nonzero()[0])
            self.problems.append(
                f"logits are NaN or infinite, first in window {windows.start + window} at position {position + offset}"
            )


def _token_scores(found: Tensor, expected: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Per token, float64 [windows, positions]; logits [windows, positions, vocab], targets [windows, positions, 1]."""
    log_found = torch.log_softmax(found.double(), dim=-1)
    log_expected = torch.log_softmax(expected.double(), dim=-1)
    error = (found - expected).abs()
    best = expected.topk(2, dim=-1)
    return {
        "nll": -log_found.gather(-1, targets).squeeze(-1),
        "reference_nll": -log_expected.gather(-1, targets).squeeze(-1),
        "kl": (log_expected.exp() * (log_expected - log_found)).sum(dim=-1),
        "largest_error": error.amax(dim=-1).double(),
        "mean_error": error.mean(dim=-1).double(),
        "spread": expected.double().std(dim=-1),
        "margin": (best.values[..., 0] - best.values[..., 1]).double(),
        "agrees": (found.argmax(dim=-1) == best.indices[..., 0]).double(),
    }
