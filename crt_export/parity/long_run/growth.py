"""Growth of an error: the slope of a straight line, with an interval that knows neighbours are alike.

The run is cut into units of equal length (a window each, or less where windows are long), and the unit's error is one
observation. Ordinary least
squares gives the slope; text changes slowly, so the residuals of neighbouring units are correlated and the usual
interval would be too narrow. The number of observations is therefore reduced to ``n (1 - r) / (1 + r)``, with r the
lag-1 autocorrelation of the residuals (a negative one counts as 0), in the standard error as well as in the degrees of
freedom of Student's t: the adjustment of B. D. Santer et al., "Statistical significance of trends and trend differences
in layer-average atmospheric temperature time series", J. Geophys. Res. 105 (2000), 7337-7356, section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from crt_export.parity.statistics import student_t_quantile

#: Fewer observations give no interval.
SMALLEST_UNITS = 8
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A slope per 1,000 tokens.

    Attributes:
        slope: Growth per 1,000 tokens, in units of the observations.
        low: Lower end of its 95 % interval.
        high: Upper end.
        mean: Mean of the observations.
        units: Number of observations.
        unit_tokens: Tokens of each.
        autocorrelation: Of neighbouring residuals, as it entered the interval.
    """

    slope: float
    low: float
    high: float
    mean: float
    units: int
    unit_tokens: int
    autocorrelation: float

    def over(self, tokens: int) -> tuple[float, float, float]:
        """Growth over so many tokens in units of the mean: low, slope, high; an error that starts at 0 gives 2."""
        low, slope, high = (rate * tokens / 1000 / max(self.mean, _TINY) for rate in (self.low, self.slope, self.high))
        return low, slope, high


def growth_from_units(errors: np.ndarray, unit_tokens: int) -> Growth | None:
    """Fit the line.

    Args:
        errors: Error of every unit in the order of the run, float [units].
        unit_tokens: Tokens of a unit.

    Returns:
        The growth; None where there are fewer than ``SMALLEST_UNITS`` units, NaN where an error is not finite.
    """
    count = len(errors)
    if count < SMALLEST_UNITS:
        return None
    if not np.isfinite(errors).all():
        none = math.nan
        return Growth(
            slope=none, low=none, high=none, mean=none, units=count, unit_tokens=unit_tokens, autocorrelation=none
        )
    place = (np.arange(count) - (count - 1) / 2) * unit_tokens / 1000
    spread = float((place**2).sum())
    slope = float((place * errors).sum()) / spread
    residuals = errors - errors.mean() - slope * place
    power = float((residuals**2).sum())
    correlation = max(0.0, float((residuals[1:] * residuals[:-1]).sum()) / power) if power > 0 else 0.0
    effective = max(3.0, count * (1 - correlation) / (1 + correlation))
    half = student_t_quantile(int(effective - 2)) * math.sqrt(power / (effective - 2) / spread)
    return Growth(
        slope=slope,
        low=slope - half,
        high=slope + half,
        mean=float(errors.mean()),
        units=count,
        unit_tokens=unit_tokens,
        autocorrelation=correlation,
    )
