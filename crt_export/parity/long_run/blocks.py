"""Figures of a run by block, and the error of every unit that its growth is fitted to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crt_export.parity.long_run.run import TargetRun
from crt_export.parity.long_run.schedule import Schedule

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
    norms = dict(_state_means(run, part))
    return Block(
        start=part.start,
        stop=part.stop,
        nll=float(scores.nll[0, part].mean()),
        reference_nll=float(scores.reference_nll[0, part].mean()),
        relative_error=_ratio(scores.mean_error[0, part], scores.spread[0, part]),
        kl=float(scores.kl[0, part].mean()),
        top1_agreement=float(scores.agrees[0, part][counted].mean()) if counted.any() else None,
        state_norm=norms.get("state_norm"),
        reference_state_norm=norms.get("reference_norm"),
        state_error=norms["state_error"] / max(norms["reference_norm"], _TINY) if norms else None,
        gated=gated,
    )


def _state_means(run: TargetRun, part: slice) -> Iterator[tuple[str, float]]:
    for name in ("state_norm", "reference_norm", "state_error"):
        values = getattr(run, name)
        if values is not None:
            yield name, float(values[part].mean())


def _ratio(errors: np.ndarray, spreads: np.ndarray) -> float:
    return float(errors.mean()) / max(float(spreads.mean()), _TINY)
