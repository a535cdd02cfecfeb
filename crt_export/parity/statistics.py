"""Paired statistics: what a mean difference is worth, with windows of text as the units.

Tokens of one window depend on each other, so the window, not the token, is the unit of the interval: the mean
difference of every window is one observation and a Student t interval covers their mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

METHOD = (
    "mean over windows of the paired difference, 95 % Student t interval with windows as units; top1_ci and "
    "relative_logit_error_ci: the same of a ratio of sums, linearised"
)
CONFIDENCE = 0.95
_GRID = 200_001
_LARGEST_EXPONENT = 700  # float64 ends near exp(709)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the 95 % confidence interval around it."""

    mean: float
    low: float
    high: float

    def within(self, limit: float) -> bool:
        """Equivalence test: True only if the whole interval lies in [-limit, limit]; NaN is never inside."""
        return -limit <= self.low and self.high <= limit


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite beyond what float64 holds, and for NaN."""
    return math.exp(nll) if nll < _LARGEST_EXPONENT else math.inf


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


@cache
def student_t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t: P(|T| <= t) = confidence.

    With T = sqrt(v) tan(a) the density of the angle a is proportional to cos(a)^(v-1), so the quantile is read off
    the running integral of that over [0, pi/2].

    Args:
        freedom: Degrees of freedom v, at least 1.
        confidence: Probability between 0 and 1.
    """
    # cos^(v-1) is negligible beyond a few times 1/sqrt(v): spend the grid where the mass is.
    end = min(math.pi / 2, 12 / math.sqrt(freedom))
    angle = np.linspace(0.0, end, _GRID)
    density = np.cos(angle) ** (freedom - 1)
    running = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(confidence, running / running[-1], angle)))
