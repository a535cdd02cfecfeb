"""Figures of a long run: blocks of tokens, and the growth of the error over all of them.

The growth is the slope of a straight line, with an interval that knows neighbours are alike. The run is cut into units
of equal length (a window each, or less where windows are long), and the unit's error is one observation. Ordinary least
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

from crt_export.parity.long_run.run import TargetRun
from crt_export.parity.long_run.schedule import Schedule
from crt_export.parity.statistics import student_t_quantile

#: Fewer observations give no interval.
SMALLEST_UNITS = 8
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive tokens; the fields are the keys of ``data``, see :mod:`crt_export.parity.long_run`."""

    start: int
    stop: int
    nll: float
    reference_nll: float
    relative_error: float
    kl: float
    top1_agreement: float | None
    state_norm: float | None
    reference_state_norm: float | None
    state_error: float | None
    gated: bool

    @property
    def state_norm_change(self) -> float | None:
        """|log ratio| of the norm of the state to the reference's; None where there is no state."""
        if self.state_norm is None or self.reference_state_norm is None:
            return None
        if not (self.state_norm > 0 and math.isfinite(self.state_norm) and self.reference_state_norm > 0):
            return math.nan
        return abs(math.log(self.state_norm / self.reference_state_norm))


def blocks_of_run(run: TargetRun, schedule: Schedule, near_tie_margin: float) -> list[Block]:
    """Every block of a run.

    Args:
        run: What was measured.
        schedule: Where the blocks are.
        near_tie_margin: Tokens whose two best candidates are closer in the reference do not count for top-1, logits.
    """
    return [_block(run, part, part.stop <= schedule.gated_tokens, near_tie_margin) for part in schedule.blocks]


def unit_errors(run: TargetRun, unit_tokens: int) -> np.ndarray:
    """Relative logit error of every whole unit, float64 [units]; what is left at the end is left out."""
    count = run.scores.mean_error.shape[1] // unit_tokens
    error, spread = (
        values[0, : count * unit_tokens].reshape(count, unit_tokens).mean(axis=1)
        for values in (run.scores.mean_error, run.scores.spread)
    )
    return error / np.maximum(spread, _TINY)


def relative_error(run: TargetRun, tokens: int) -> float:
    """Relative logit error of the first tokens; NaN for none."""
    if tokens == 0:
        return math.nan
    return _ratio(run.scores.mean_error[0, :tokens], run.scores.spread[0, :tokens])


def _block(run: TargetRun, part: slice, gated: bool, near_tie_margin: float) -> Block:
    scores = run.scores
    counted = scores.margin[0, part] > near_tie_margin
    norms = {name: float(values[part].mean()) for name, values in run.norms.items()}
    return Block(
        start=part.start,
        stop=part.stop,
        nll=float(scores.nll[0, part].mean()),
        reference_nll=float(scores.reference_nll[0, part].mean()),
        relative_error=_ratio(scores.mean_error[0, part], scores.spread[0, part]),
        kl=float(scores.kl[0, part].mean()),
        top1_agreement=float(scores.agrees[0, part][counted].mean()) if counted.any() else None,
        state_norm=norms.get("state"),
        reference_state_norm=norms.get("reference"),
        state_error=norms["error"] / max(norms["reference"], _TINY) if norms else None,
        gated=gated,
    )


def _ratio(errors: np.ndarray, spreads: np.ndarray) -> float:
    return float(errors.mean()) / max(float(spreads.mean()), _TINY)


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
        unknown = dict.fromkeys(("slope", "low", "high", "mean", "autocorrelation"), math.nan)
        return Growth(units=count, unit_tokens=unit_tokens, **unknown)
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
