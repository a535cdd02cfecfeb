"""Confidence intervals over windows of text: Student's t for means, BCa bootstrap for statistics of sums.

Tokens of one window depend on each other, so the window, not the token, is the unit. A paired difference has one
observation per window, and a Student t interval covers their mean. The bootstrap draws whole windows with replacement,
or blocks of neighbouring ones where there are many. Its seed is fixed, so every figure and every target with as many
windows sees the same resamples, and differences between them are paired. The interval is bias-corrected and accelerated
(B. Efron, Better bootstrap confidence intervals, JASA 82 (1987)): it follows skewed figures such as a mean divergence,
and a monotone function of a figure has, but for the jackknife's estimate of the acceleration, that function of its
interval.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 4000
SEED = 20_260_627
#: Most units that are drawn; neighbouring windows beyond that go together, which keeps the resamples below 16 MiB.
MOST_BLOCKS = 512
METHOD = (
    "mean over windows of the paired difference, 95 % Student t interval with windows as units; top1_ci and "
    "relative_logit_error_ci: the same of a ratio of sums, linearised; "
    f"bootstrap intervals: BCa, {RESAMPLES:,} resamples of whole windows (of at most {MOST_BLOCKS} blocks of "
    f"neighbouring ones), seed {SEED}, the same resamples for every figure"
)

#: Sums [..., terms] -> figure [...].
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the 95 % confidence interval around it."""

    mean: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    def within(self, limit: float) -> bool:
        """Equivalence test: True only if the whole interval lies in [-limit, limit]; NaN is never inside."""
        return -limit <= self.low and self.high <= limit


# --- Student's t
@cache
def student_t_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: P(|T| <= t) = 0.95, with so many degrees of freedom, at least 1."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def paired_interval(differences: np.ndarray) -> Interval:
    """Interval of the mean of paired differences.

    Args:
        differences: One value per unit and position, float [units, positions]; units are equally long.

    Returns:
        The mean and its 95 % interval; NaN or infinite differences give NaN bounds.

    Raises:
        ValueError: Fewer than two units, or no positions: there is no interval to be had.
    """
    if differences.ndim != 2 or differences.shape[0] < 2 or differences.shape[1] < 1:
        raise ValueError(f"a paired interval needs at least two windows of one position, found {differences.shape}")
    units = differences.astype(np.float64).mean(axis=1)
    mean = float(units.mean())
    if not math.isfinite(mean):
        return Interval(mean=math.nan, low=math.nan, high=math.nan)
    half = student_t_quantile(len(units) - 1) * float(units.std(ddof=1)) / math.sqrt(len(units))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def ratio_interval(parts: np.ndarray, wholes: np.ndarray) -> Interval:
    """Interval of a ratio of two sums over all windows, windows as units.

    Args:
        parts: What is summed above the line, float [units, positions].
        wholes: Below the line, same shape; a share over counted tokens has 1 where a token counts and 0 elsewhere.

    Returns:
        The ratio and its interval from the windows' linearised deviations; the ratio may have an interval of width 0,
        where all windows agree, and its bounds are not cut to what is possible.

    Raises:
        ValueError: Fewer than two units, no positions, or nothing below the line.
    """
    whole = float(wholes.sum())
    if not whole > 0:
        raise ValueError(f"a ratio needs something to divide by, found {whole}")
    ratio = float(parts.sum()) / whole
    spread = paired_interval((parts - ratio * wholes) * (wholes.size / whole))
    return Interval(mean=ratio, low=ratio + spread.low, high=ratio + spread.high)


# --- bootstrap
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
        The figure of all windows and its interval; NaN bounds where the figure is not finite.

    Raises:
        ValueError: Fewer than two windows: there is no interval to be had.
    """
    if sums.ndim != 2 or len(sums) < 2:
        raise ValueError(f"a bootstrap interval needs at least two windows, found sums of shape {sums.shape}")
    units = _blocks(sums)
    figure = float(statistic(units.sum(axis=0)))
    if not math.isfinite(figure):
        return Interval(mean=figure, low=math.nan, high=math.nan)
    if np.ptp(units, axis=0).max() == 0:
        return Interval(mean=figure, low=figure, high=figure)  # every resample is the sample
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # its ends are NaN, and replaced below
        found = stats.bootstrap(
            (np.arange(len(units)),),
            # In one order, so that resamples of the same windows have the same figure to the last bit: ties count half.
            lambda drawn, axis: statistic(units[np.sort(drawn, axis=axis)].sum(axis=drawn.ndim + axis)),
            n_resamples=RESAMPLES,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(SEED),
        )
    low, high = (float(end) for end in found.confidence_interval)
    if math.isnan(low) or math.isnan(high):
        # The figure does not depend on what is drawn, or lies beyond every resample.
        drawn = found.bootstrap_distribution
        low, high = float(np.min(drawn)), float(np.max(drawn))
    return Interval(mean=figure, low=low, high=high)


def _blocks(sums: np.ndarray) -> np.ndarray:
    if len(sums) <= MOST_BLOCKS:
        return sums
    starts = np.arange(MOST_BLOCKS) * len(sums) // MOST_BLOCKS
    return np.add.reduceat(sums, starts, axis=0)
