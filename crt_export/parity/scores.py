"""Compare logits piece by piece; keep a few numbers per token and never all logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crt_export.parity.reference import Reference, first_position
from crt_export.text import fill_unscored

#: Tokens that the overlap looks at.
TOP = 10
#: Logits compared at a time: enough to amortise the calls, little enough for any vocabulary.
BLOCK_ELEMENTS = 2_000_000
_FAR = 30.0
_PER_TOKEN = ("nll", "reference_nll", "kl", "largest_error", "mean_error", "spread", "margin", "agrees", "overlap")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What was measured at every window and position, arrays [windows, positions]; NaN where nothing was.

    Attributes:
        start: Position in the window of the first column.
        nll: Negative log-likelihood of the next token, nats, float64.
        reference_nll: The reference's.
        kl: Kullback-Leibler divergence of this distribution from the reference's, nats, see :func:`divergence`.
        largest_error: Largest |logit difference|.
        mean_error: Mean |logit difference| over the vocabulary.
        spread: Standard deviation of the reference's logits over the vocabulary.
        margin: Distance of the reference's two best logits.
        agrees: 1.0 where both have the same best token, else 0.0.
        overlap: Share of the target's ten likeliest tokens (``min(10, vocab)``) that are among the reference's ten; one
            whose logit in the reference is a near tie with the tenth counts.
        vocab: Size of the vocabulary.
        trained: Length the model was trained at; None where it is not known.
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
    overlap: np.ndarray
    trained: int | None = None

    @property
    def probability_change(self) -> np.ndarray:
        """Probability of the text's next token less the reference's, as p (exp(d) - 1): no cancellation."""
        return np.exp(-self.reference_nll) * np.expm1(self.reference_nll - self.nll)

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

    def __init__(self, reference: Reference, regime: str, passes: int, *, near_tie_margin: float = 0.0) -> None:
        """Compare ``regime`` with ``passes`` parallel passes.

        Args:
            reference: What to compare with.
            regime: step, prefill, prefill_pass or handover.
            passes: Parallel passes K.
            near_tie_margin: How far below the reference's tenth logit a token still counts as one of its ten.
        """
        self.reference, self.regime, self.passes = reference, regime, passes
        self._near_tie = near_tie_margin
        self.start = first_position(regime, reference.windows.length)
        shape = (reference.windows.count, reference.windows.length - self.start)
        self._arrays = {name: np.full(shape, np.nan) for name in _PER_TOKEN}
        self._targets = torch.from_numpy(reference.windows.targets).clamp(min=0)
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
        bad = ~torch.isfinite(found).all(dim=-1)
        if bad.any() and not self.problems:
            window, offset = (int(index) for index in bad.nonzero()[0])
            self.problems.append(
                f"logits are NaN or infinite, first in window {windows.start + window} at position {position + offset}"
            )
        columns = slice(positions.start - self.start, positions.stop - self.start)
        for name, values in token_scores(found, expected, targets, self._near_tie).items():
            self._arrays[name][windows, columns] = values.numpy()

    def scores(self) -> Scores:
        """Everything compared so far."""
        config, targets = self.reference.model.config, self.reference.windows.targets[:, self.start :]
        for name in ("nll", "reference_nll"):
            self._arrays[name] = fill_unscored(self._arrays[name], targets)
        return Scores(
            start=self.start, vocab=config.vocab_size, trained=config.training_sequence_length, **self._arrays
        )


def reference_nll(reference: Reference, regime: str, passes: int) -> np.ndarray:
    """The reference's own negative log-likelihood of every next token, nats, float64 [windows, positions]."""
    windows, start = reference.windows, first_position(regime, reference.windows.length)
    targets = torch.from_numpy(windows.targets).clamp(min=0)
    everything = slice(0, windows.count)
    block = max(1, BLOCK_ELEMENTS // (windows.count * reference.model.config.vocab_size))
    parts = []
    for first in range(start, windows.length, block):
        positions = slice(first, min(first + block, windows.length))
        logits = reference.logits(regime, passes, everything, positions).double()
        parts.append(-torch.log_softmax(logits, dim=-1).gather(-1, targets[:, positions, None]).squeeze(-1))
    return fill_unscored(torch.cat(parts, dim=1).numpy(), windows.targets[:, start:])


def token_scores(found: Tensor, expected: Tensor, targets: Tensor, near_tie: float) -> dict[str, Tensor]:
    """The arrays of :class:`Scores`.

    Args:
        found: Logits of the target, float32 [windows, positions, vocab].
        expected: Those of the reference, the same shape.
        targets: The text's next tokens, int64 [windows, positions, 1].
        near_tie: How far below the reference's tenth logit a token still counts as one of its ten.

    Returns:
        Per name, float64 [windows, positions].
    """
    kept = min(TOP, expected.shape[-1])
    best, chosen = expected.topk(kept, dim=-1).values, found.topk(kept, dim=-1).indices
    among_best = expected.gather(-1, chosen) >= best[..., -1:] - near_tie
    agrees = found.argmax(dim=-1) == expected.argmax(dim=-1)
    expected = expected.double()
    log_found, log_expected = torch.log_softmax(found.double(), dim=-1), torch.log_softmax(expected, dim=-1)
    error = found.double().sub_(expected)
    scores = {
        "nll": -log_found.gather(-1, targets).squeeze(-1),
        "reference_nll": -log_expected.gather(-1, targets).squeeze(-1),
        "kl": divergence(log_expected, log_found, error),
        "spread": expected.std(dim=-1),
        "margin": (best[..., 0] - best[..., 1]).double(),
        "agrees": agrees.double(),
        "overlap": among_best.double().mean(dim=-1),
    }
    magnitude = error.abs_()
    return {**scores, "largest_error": magnitude.amax(dim=-1), "mean_error": magnitude.mean(dim=-1)}


def divergence(log_expected: Tensor, log_found: Tensor, error: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p || q) of two softmax distributions, nats, without cancellation.

    With the logit difference e = found - expected and d = e - E_p[e], log(p / q) = log(E_p[exp(d)]) - d, so that
    KL = log(1 + E_p[exp(d) - 1 - d]): every term is at least 0, where the textbook sum p log(p / q) subtracts terms
    that are 1e6 times the result from each other. Where a logit differs by more than 30, that is by so much that
    nothing cancels and exp(d) may overflow, the textbook sum is taken.

    Args:
        log_expected: log p, float64 [..., vocab].
        log_found: log q, the same shape.
        error: found - expected of the logits, the same shape; unchanged.

    Returns:
        float64 [...]. Rounding can leave a sum of zeros at some -1e-30: that, and nothing else, is cut to 0.
    """
    weights = log_expected.exp()
    centred = error - (weights * error).sum(dim=-1, keepdim=True)
    far = centred.amax(dim=-1) > _FAR
    excess = torch.expm1(centred).sub_(centred).mul_(weights).sum(dim=-1)
    result = torch.log1p(excess)
    if far.any():
        result[far] = (weights[far] * (log_expected[far] - log_found[far])).sum(dim=-1)
    return result.clamp_(min=0)
