"""Percentiles of samples, and ratios of candidates that ran in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crt_export.bench.report import Quantiles

RESAMPLES = 2000
SEED = 20_260_627


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A median and the ends of its 95 % interval."""

    median: float
    low: float
    high: float


def quantiles(samples: Sequence[float]) -> Quantiles:
    """10th, 50th and 90th percentile of at least one sample, with the samples themselves."""
    p10, p50, p90 = np.percentile(np.asarray(samples, np.float64), (10, 50, 90)).tolist()
    return Quantiles(p10=p10, p50=p50, p90=p90, samples=tuple(float(sample) for sample in samples))


def paired_ratio(of: Sequence[Sequence[float]], against: Sequence[Sequence[float]]) -> Interval:
    """How many times longer ``against`` took than ``of``, round by round, so that a machine's drift cancels.

    Args:
        of: Per round the times of the candidate that is judged, any unit.
        against: Per round those of the other one.

    Returns:
        The median of the rounds' ratios of medians. Its interval is a percentile bootstrap over rounds
        (``RESAMPLES`` resamples, a fixed seed), which says how much the rounds differ, not what another day gives.
    """
    ratios = np.array([np.median(b) / np.median(a) for a, b in zip(of, against, strict=True)], np.float64)
    drawn = np.random.default_rng(SEED).integers(ratios.size, size=(RESAMPLES, ratios.size))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), (2.5, 97.5)).tolist()
    return Interval(median=float(np.median(ratios)), low=low, high=high)
