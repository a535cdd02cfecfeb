"""Curves over the number of passes: by range of positions, by position, after a handover, of the residual.

The residual stands for the error: a fixed-point iteration that contracts by q per pass has an error of at most
q / (1 - q) times its last change, so the residual bounds the error where q is below one half. Once only rounding is
left the error no longer falls and the residual says nothing about it: the ratio tells where that begins.

Where passes may stop is simulated from what every number of passes gave on every window: a window stops at its first
pass whose residual is at most the bound, and one that never gets there is fed token by token, which costs nothing but
time. A bound holds if the perplexity of windows stopped so lies within the limit of the recurrence's with 95 %
confidence. The one that is taken is the largest up to which every smaller one holds too: one that holds beyond others
that do not is luck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from crt_export.parity.certificate.measurement import Coverage, Measurement
from crt_export.parity.report import perplexity
from crt_export.parity.statistics import Interval, paired_interval

_FEWEST_WINDOWS = 3
#: Bounds that are tried at most; quantiles of the residuals where there are more of those.
_MOST_BOUNDS = 200


def span_curves(
    measured: Measurement, coverage: Coverage, reference: Measurement | None, perplexity_gap: float
) -> list[dict[str, Any]]:
    """The agreed ``spans`` of the level's data, see :mod:`crt_export.parity.certificate`.

    Args:
        measured: Of the target, or of the reference itself.
        coverage: What was run.
        reference: PyTorch FP32 on the same windows; None leaves out the excess.
        perplexity_gap: The largest |perplexity gap| that counts as none.
    """
    curves = []
    for span in coverage.spans:
        sequential, nll = measured.sequential_nll[:, span], [found[:, span] for found in measured.nll]
        means, gaps = [float(found.mean()) for found in nll], [perplexity_gap_interval(f, sequential) for f in nll]
        excess = reference and [excess_interval(measured, reference, k, span) for k in range(len(nll))]
        curves.append(
            {
                "start": span.start,
                "stop": span.stop,
                "gated": coverage.gated(span),
                "sequential_nll": float(sequential.mean()),
                "sequential_perplexity": perplexity(float(sequential.mean())),
                "nll": means,
                "perplexity": [perplexity(value) for value in means],
                **_curve("gap_nll", [paired_interval(found - sequential) for found in nll]),
                **_curve("perplexity_gap", gaps),
                **_curve("kl", [paired_interval(kl[:, span]) for kl in measured.kl]),
                **_curve("excess", excess),
                "smallest_passes": smallest_passes(coverage.passes, gaps, perplexity_gap),
            }
        )
    return curves


def _curve(name: str, intervals: Sequence[Interval] | None) -> dict[str, Any]:
    """``name`` and ``name_ci``: means and ends of intervals, one per number of passes; None where there are none."""
    if intervals is None:
        return {name: None, f"{name}_ci": None}
    return {name: [one.mean for one in intervals], f"{name}_ci": [one.ends for one in intervals]}


def perplexity_gap_interval(nll: np.ndarray, sequential: np.ndarray) -> Interval:
    """Interval of exp(mean nll) - exp(mean sequential nll), paired.

    Delta method: the gap is linear in the windows' mean likelihoods near their overall means, with the two
    perplexities as slopes; the windows' linearised gaps are the units of a Student t interval.

    Args:
        nll: Negative log-likelihoods, nats, float64 [windows, positions].
        sequential: Those it is compared with.
    """
    parallel, recurrent = perplexity(float(nll.mean())), perplexity(float(sequential.mean()))
    if not math.isfinite(parallel + recurrent):
        return Interval(mean=math.nan, low=math.nan, high=math.nan)
    units = parallel * (nll - nll.mean()) - recurrent * (sequential - sequential.mean())
    # expm1 keeps the digits of a gap far below the perplexity itself.
    gap = recurrent * math.expm1(float((nll - sequential).mean()))
    spread = paired_interval(units)
    return Interval(mean=gap, low=gap + spread.low, high=gap + spread.high)


def smallest_passes(passes: Sequence[int], gaps: Sequence[Interval], limit: float) -> int | None:
    """The smallest number of passes from which on every gap lies within +- limit with 95 % confidence; None: none."""
    found = None
    for count, gap in sorted(zip(passes, gaps, strict=True), key=lambda pair: pair[0], reverse=True):
        if not gap.within(limit):
            break
        found = count
    return found


def excess_interval(measured: Measurement, reference: Measurement, index: int, span: slice) -> Interval:
    """How much larger the target's gap is than FP32's, paired by token, nats.

    Args:
        measured: Of the target.
        reference: PyTorch FP32 on the same windows.
        index: Which number of passes, an index of ``Coverage.passes``.
        span: Positions.
    """
    own, model = ((run.nll[index] - run.sequential_nll)[:, span] for run in (measured, reference))
    return paired_interval(own - model)


def position_curves(measured: Measurement, coverage: Coverage) -> dict[str, Any]:
    """The agreed ``positions`` of the level's data: every number of passes against the length of the prefix."""
    buckets = [slice(start, stop) for start, stop in pairwise(coverage.edges)]
    curves: dict[str, Any] = {"edges": list(coverage.edges), "passes": list(coverage.passes)}
    for name, values in (("gap_nll", measured.nll - measured.sequential_nll), ("kl", measured.kl)):
        rows = [_curve(name, [paired_interval(of_k[:, bucket]) for bucket in buckets]) for of_k in values]
        curves |= {key: [row[key] for row in rows] for key in (name, f"{name}_ci")}
    return curves


def handover_curves(measured: Measurement, coverage: Coverage, reference: Measurement | None) -> list[dict[str, Any]]:
    """The agreed ``handover`` of the level's data, one per place, gated ones first."""
    return [
        {
            "start": found.handover.start,
            "stop": found.handover.stop,
            "gated": found.handover.gated,
            "passes": list(coverage.selected),
            **_curve("delta_nll", [paired_interval(delta) for delta in _deltas(measured, place)]),
            **_curve("kl", [paired_interval(kl) for kl in found.kl]),
            "max_state_error": [float(error) for error in found.state_error],
            **_curve(
                "excess",
                reference and [handover_excess(measured, reference, place, k) for k in range(len(found.nll))],
            ),
        }
        for place, found in enumerate(measured.continuations)
    ]


def handover_excess(measured: Measurement, reference: Measurement, place: int, index: int) -> Interval:
    """How much more a handover costs the target than FP32, paired by token, nats.

    Args:
        measured: Of the target.
        reference: PyTorch FP32 on the same windows.
        place: Which handover.
        index: Which number of passes, an index of ``Coverage.selected``.
    """
    own, model = (_deltas(run, place)[index] for run in (measured, reference))
    return paired_interval(own - model)


def _deltas(measured: Measurement, place: int) -> np.ndarray:
    """[passes, windows, positions] above the recurrence at the same tokens."""
    found = measured.continuations[place]
    return found.nll - measured.sequential_nll[:, found.handover.start : found.handover.stop]


def residual_curve(measured: Measurement, coverage: Coverage) -> list[dict[str, Any]]:
    """The agreed ``residual`` of the level's data, one entry per number of passes, windows as units."""
    curve = []
    for passes, residual, error in zip(coverage.passes, measured.residual, measured.error, strict=True):
        moved = residual > 0
        ratio = error[moved] / residual[moved]
        curve.append(
            {
                "passes": passes,
                "residual_median": float(np.median(residual)),
                "error_median": float(np.median(error)),
                "error_max": float(error.max()),
                "ratio_median": float(np.median(ratio)) if len(ratio) else None,
                "ratio_p95": float(np.percentile(ratio, 95)) if len(ratio) else None,
                "correlation": _log_correlation(residual, error),
            }
        )
    return curve


def _log_correlation(residual: np.ndarray, error: np.ndarray) -> float | None:
    """Pearson's correlation of the logarithms over windows; None where it has no meaning."""
    positive = (residual > 0) & (error > 0)
    if positive.sum() < _FEWEST_WINDOWS:
        return None
    pair = np.log(np.stack([residual[positive], error[positive]]).astype(np.float64))
    if (np.ptp(pair, axis=1) == 0).any():
        return None
    return float(np.corrcoef(pair)[0, 1])


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """Where passes stop.

    Attributes:
        bound: Largest |change of h| of a pass that may be the last.
        gap: Perplexity of windows that stopped there - the recurrence's, 95 % interval over windows.
        passes: Mean number of passes of the windows that stopped; NaN where none did.
        most_passes: Largest of them.
        unreached: Share of the windows that never got there and went token by token.
    """

    bound: float
    gap: Interval
    passes: float
    most_passes: int
    unreached: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, see :mod:`crt_export.parity.certificate`."""
        return {
            "bound": self.bound,
            "perplexity_gap": self.gap.mean,
            "perplexity_gap_ci": [self.gap.low, self.gap.high],
            "passes_mean": self.passes,
            "passes_most": self.most_passes,
            "unreached": self.unreached,
        }


def stopping_bound(
    passes: Sequence[int], residual: np.ndarray, nll: np.ndarray, sequential_nll: np.ndarray, limit: float
) -> Stopping | None:
    """The largest bound on the residual that holds.

    Args:
        passes: Numbers of passes, rising.
        residual: Largest |change of h| in the last of them, float [passes, windows].
        nll: Negative log-likelihood after them, nats, float64 [passes, windows, positions].
        sequential_nll: In the recurrence, float64 [windows, positions].
        limit: Largest |perplexity gap|.

    Returns:
        None where no bound holds.
    """
    candidates = np.unique(residual[residual > 0])
    if len(candidates) > _MOST_BOUNDS:
        candidates = np.unique(np.quantile(candidates, np.linspace(0, 1, _MOST_BOUNDS), method="lower"))
    found = None
    for bound in candidates.tolist():
        stopping = _stopped(bound, passes, residual, nll, sequential_nll)
        if not stopping.gap.within(limit):
            break
        found = stopping
    return found


def _stopped(
    bound: float, passes: Sequence[int], residual: np.ndarray, nll: np.ndarray, sequential_nll: np.ndarray
) -> Stopping:
    small = np.asarray(residual <= bound)
    reached = np.any(small, axis=0)
    first = np.argmax(small, axis=0)
    windows = np.arange(residual.shape[1])
    after = np.where(reached[:, None], nll[first, windows], sequential_nll)
    made = np.asarray(passes)[first[reached]]
    return Stopping(
        bound=bound,
        gap=perplexity_gap_interval(after, sequential_nll),
        passes=float(made.mean()) if len(made) else float("nan"),
        most_passes=int(made.max(initial=0)),
        unreached=float(1 - reached.mean()),
    )
