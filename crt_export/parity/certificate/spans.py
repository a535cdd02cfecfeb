"""Curves over the number of passes, by span of positions and by position, with windows as units of their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from crt_export.parity.certificate.coverage import Coverage
from crt_export.parity.certificate.measurement import Measurement
from crt_export.parity.report import perplexity
from crt_export.parity.statistics import Interval, paired_interval


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
    return [_span_curve(measured, coverage, span, reference, perplexity_gap) for span in coverage.spans]


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
    gaps = [(form.nll[index] - form.sequential_nll)[:, span] for form in (measured, reference)]
    return paired_interval(gaps[0] - gaps[1])


def position_curves(measured: Measurement, coverage: Coverage) -> dict[str, Any]:
    """The agreed ``positions`` of the level's data: every number of passes against the length of the prefix."""
    edges = coverage.edges
    buckets = [slice(start, stop) for start, stop in pairwise(edges)]
    gaps = [_by_bucket(nll - measured.sequential_nll, buckets) for nll in measured.nll]
    divergences = [_by_bucket(kl, buckets) for kl in measured.kl]
    return {
        "edges": list(edges),
        "passes": list(coverage.passes),
        "gap_nll": [_means(row) for row in gaps],
        "gap_nll_ci": [bounds(row) for row in gaps],
        "kl": [_means(row) for row in divergences],
        "kl_ci": [bounds(row) for row in divergences],
    }


def bounds(intervals: Sequence[Interval]) -> list[tuple[float, float]]:
    """Low and high of each."""
    return [(interval.low, interval.high) for interval in intervals]


def _span_curve(
    measured: Measurement, coverage: Coverage, span: slice, reference: Measurement | None, limit: float
) -> dict[str, Any]:
    sequential, curves = measured.sequential_nll[:, span], range(len(coverage.passes))
    gaps = [paired_interval(measured.nll[k][:, span] - sequential) for k in curves]
    perplexity_gaps = [perplexity_gap_interval(measured.nll[k][:, span], sequential) for k in curves]
    divergences = [paired_interval(measured.kl[k][:, span]) for k in curves]
    nll = [float(measured.nll[k][:, span].mean()) for k in curves]
    excess = [excess_interval(measured, reference, k, span) for k in curves] if reference is not None else None
    return {
        "start": span.start,
        "stop": span.stop,
        "gated": coverage.gated(span),
        "sequential_nll": float(sequential.mean()),
        "sequential_perplexity": perplexity(float(sequential.mean())),
        "nll": nll,
        "perplexity": [perplexity(value) for value in nll],
        "gap_nll": _means(gaps),
        "gap_nll_ci": bounds(gaps),
        "perplexity_gap": _means(perplexity_gaps),
        "perplexity_gap_ci": bounds(perplexity_gaps),
        "kl": _means(divergences),
        "kl_ci": bounds(divergences),
        "excess": None if excess is None else _means(excess),
        "excess_ci": None if excess is None else bounds(excess),
        "smallest_passes": smallest_passes(coverage.passes, perplexity_gaps, limit),
    }


def _by_bucket(values: np.ndarray, buckets: Sequence[slice]) -> list[Interval]:
    return [paired_interval(values[:, bucket]) for bucket in buckets]


def _means(intervals: Sequence[Interval]) -> list[float]:
    return [interval.mean for interval in intervals]
