"""Bootstrap intervals of any statistic of sums over windows: BCa, seeded, the same resamples for every figure.

Tokens of one window depend on each other, so whole windows are drawn with replacement; where there are many, blocks of
neighbouring windows are. A statistic is a function of sums (a mean is a sum over a count), so a resample costs one row
of a matrix product. Since every figure and every target with as many windows sees the same resamples, differences
between them are paired. The interval is bias-corrected and accelerated (BCa): B. Efron, Better bootstrap confidence
intervals, JASA 82 (1987); it follows skewed figures such as a mean divergence, and a monotone function of a figure has,
but for the jackknife's estimate of the acceleration, that function of its interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from crt_export.parity.statistics import CONFIDENCE, Interval

RESAMPLES = 4000
SEED = 20_260_627
#: Most units that are drawn; neighbouring windows beyond that go together, which keeps the matrix below 16 MiB.
MOST_BLOCKS = 512
METHOD = (
    f"bootstrap intervals: BCa, {RESAMPLES:,} resamples of whole windows (of at most {MOST_BLOCKS} blocks of "
    f"neighbouring ones), seed {SEED}, the same resamples for every figure"
)

#: Sums [..., terms] -> figure [...].
Statistic = Callable[[np.ndarray], np.ndarray]


def window_sums(*terms: np.ndarray) -> np.ndarray:
    """What a statistic is made of: the sum of each term over each window.

    Args:
        terms: Float [windows, positions] each.

    Returns:
        float64 [windows, terms].
    """
    return np.stack([term.sum(axis=1, dtype=np.float64) for term in terms], axis=1)


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum over the second; a mean, where the second counts."""
    return sums[..., 0] / sums[..., 1]


def bootstrap_mean(values: np.ndarray) -> Interval:
    """Mean and interval of values [windows, positions]."""
    return bootstrap_interval(window_sums(values, np.ones_like(values)), ratio)


def bootstrap_interval(sums: np.ndarray, statistic: Statistic) -> Interval:
    """A figure and its 95 % BCa interval.

    Args:
        sums: float64 [windows, terms], see :func:`window_sums`; at least two windows.
        statistic: Makes the figure of sums, for many resamples at once.

    Returns:
        The figure of all windows and its interval; NaN bounds where the figure is not finite. Resamples that leave
        nothing to divide by are left out.

    Raises:
        ValueError: Fewer than two windows: there is no interval to be had.
    """
    if sums.ndim != 2 or len(sums) < 2:
        raise ValueError(f"a bootstrap interval needs at least two windows, found sums of shape {sums.shape}")
    blocks = _blocks(sums)
    total = blocks.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        figure = float(statistic(total))
        drawn = statistic(_draws(len(blocks)) @ blocks)
        without = statistic(total - blocks)
    if not math.isfinite(figure):
        return Interval(mean=figure, low=math.nan, high=math.nan)
    drawn, without = drawn[np.isfinite(drawn)], without[np.isfinite(without)]
    if np.ptp(blocks, axis=0).max() == 0 or not len(drawn):
        return Interval(mean=figure, low=figure, high=figure)  # every resample is the sample
    low, high = np.quantile(drawn, _levels(figure, drawn, without))
    return Interval(mean=figure, low=float(low), high=float(high))


def _blocks(sums: np.ndarray) -> np.ndarray:
    if len(sums) <= MOST_BLOCKS:
        return sums
    starts = np.arange(MOST_BLOCKS) * len(sums) // MOST_BLOCKS
    return np.add.reduceat(sums, starts, axis=0)


@lru_cache(maxsize=2)
def _draws(units: int) -> np.ndarray:
    """How often each resample holds each unit, float64 [RESAMPLES, units]."""
    generator = np.random.default_rng(SEED)
    drawn = generator.integers(0, units, (RESAMPLES, units)) + np.arange(RESAMPLES)[:, None] * units
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * units).reshape(RESAMPLES, units).astype(np.float64)


def _levels(figure: float, drawn: np.ndarray, without: np.ndarray) -> tuple[float, float]:
    """Which quantiles of the resamples bound the interval: Efron (1987), formula 2.3 with a from the jackknife."""
    normal = NormalDist()
    below = (np.sum(drawn < figure) + np.sum(drawn == figure) / 2) / len(drawn)
    bias = normal.inv_cdf(float(np.clip(below, 1 / (len(drawn) + 1), len(drawn) / (len(drawn) + 1))))
    change = without.mean() - without if len(without) else np.zeros(1)
    scale = float(np.abs(change).max())
    change = change / scale if scale else change
    skew = float((change**3).sum() / (6 * (change**2).sum() ** 1.5)) if scale else 0.0
    tails = (normal.inv_cdf((1 - CONFIDENCE) / 2), normal.inv_cdf((1 + CONFIDENCE) / 2))
    low, high = (normal.cdf(bias + (bias + tail) / (1 - skew * (bias + tail))) for tail in tails)
    return low, high
