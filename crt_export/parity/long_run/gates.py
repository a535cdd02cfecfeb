"""What a long run must hold: checks of one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from crt_export.parity.level import Check, gate_at_most
from crt_export.parity.long_run.blocks import Block, relative_error
from crt_export.parity.long_run.growth import SMALLEST_UNITS, Growth
from crt_export.parity.long_run.headroom import LongHeadroom
from crt_export.parity.long_run.run import TargetRun
from crt_export.parity.long_run.schedule import CHAINED, Schedule
from crt_export.parity.tolerances import Tolerances

#: Over fewer tokens the interval is wide and the text's own drift near the limit, see the package.
GATED_GROWTH_TOKENS = 12_000
GROWTH_RATE = "growth of the relative logit error per 1,000 tokens"
GROWTH = "growth of the logit error over the run / its mean"
_STATE_NORM = "largest |log ratio| of the state's norm to the reference's in a block"
_RELATIVE = "mean |logit error| / standard deviation of the logits"
_HEADROOM = "largest |value| of an FP16 tensor"


def run_checks(
    run: TargetRun, schedule: Schedule, blocks: Sequence[Block], precision: str, tolerances: Tolerances
) -> Iterator[Check]:
    """NaN watch, positions, state norm and logit error of one run; below the training length they are gates."""
    kind, limits = schedule.kind, tolerances.precisions[precision]
    yield _watch(f"{kind}: NaN and infinity", "steps with a NaN or an infinity", run.non_finite, run.first_non_finite)
    yield _watch(f"{kind}: positions", "", None, run.wrong_position)
    if any(block.state_norm is not None for block in blocks):
        yield from _state_norm_checks(kind, blocks, limits.state_norm, f"{precision}.state_norm")
    name, key = f"{kind}: logit error", f"{precision}.relative_logit_error"
    gated = schedule.gated_tokens
    if gated:
        value = relative_error(run, gated)
        yield gate_at_most(_below(name, schedule), _RELATIVE, value, limits.relative_logit_error, key)
    if gated < schedule.tokens:
        value = relative_error(run, schedule.tokens)
        yield Check(name=f"{name}, all positions", figure=_RELATIVE, value=value, tolerance=key)


def why_not_gated(schedule: Schedule, growth: Growth | None, recurrent: bool) -> str:
    """Why the growth of a run is no gate, as the end of a sentence; empty where it is one."""
    if growth is None:
        return f"it cannot be given, {schedule.tokens:,} tokens are too few for {SMALLEST_UNITS} observations"
    if schedule.kind != CHAINED:
        return "positions above the training length are in it"
    if not recurrent:
        return "no state is carried over, so the windows are independent and it shows the text, not the target"
    if schedule.tokens < GATED_GROWTH_TOKENS:
        return f"{schedule.tokens:,} tokens, it takes {GATED_GROWTH_TOKENS:,}"
    return ""


def growth_checks(schedule: Schedule, growth: Growth | None, limit: float | None, tolerance: str) -> tuple[Check, ...]:
    """The growth of one run over its mean error, a gate on the upper end of its interval, and its rate.

    Args:
        schedule: The run.
        growth: Its growth; None where it cannot be given, which is a check too, so that nobody takes it for held.
        limit: What the growth over the run may be of the mean error; None reports only.
        tolerance: Key of the limit.
    """
    name = f"{schedule.kind}: growth"
    if growth is None:
        return (Check(name=name, figure=GROWTH, tolerance=tolerance),)
    low, value, high = growth.over(schedule.tokens)
    interval = (growth.low, growth.high)
    rate = Check(name=f"{name} per 1,000 tokens", figure=GROWTH_RATE, value=growth.slope, interval=interval)
    if limit is None:
        return Check(name=name, figure=GROWTH, value=value, interval=(low, high), tolerance=tolerance), rate
    passed = high <= limit
    sentence = (
        f"{GROWTH} is {value:.3g}, 95 % interval [{low:.3g}, {high:.3g}] over {schedule.tokens:,} tokens in units of "
        f"{growth.unit_tokens}; its upper end is expected to be at most {limit:g} ({tolerance})"
    )
    gate = Check(
        name=name,
        figure=GROWTH,
        value=value,
        interval=(low, high),
        limit=limit,
        tolerance=tolerance,
        passed=passed,
        failures=() if passed else (sentence,),
    )
    return gate, rate


def headroom_checks(schedule: Schedule, headroom: LongHeadroom, limit: float) -> Iterator[Check]:
    """FP16 headroom of every layer below the training length, and the largest value of all positions."""
    name, tolerance = f"{schedule.kind}: FP16 headroom", "shared.fp16_headroom"
    for layer, value in headroom.by_layer(headroom.trained).items():
        tensor = max((t for t in headroom.trained if headroom.layers[t] == layer), key=lambda t: headroom.trained[t])
        yield gate_at_most(f"{name}, {layer}", _HEADROOM, value, limit, tolerance, where=f"in tensor {tensor}")
    if schedule.gated_tokens < schedule.tokens:
        tensor, value = next(iter(headroom.whole.items()))
        yield Check(name=f"{name}, all positions", figure=f"{_HEADROOM} ({tensor})", value=value, tolerance=tolerance)


def _watch(name: str, figure: str, count: int | None, first: str) -> Check:
    """Nothing bad at any position: an overflow above the training length is a fault of the export too."""
    failures = (f"first at {first}" if count is not None else first,) if first else ()
    return Check(name=name, figure=figure, value=count, passed=not first, failures=failures)


def _state_norm_checks(kind: str, blocks: Sequence[Block], limit: float, tolerance: str) -> Iterator[Check]:
    gated = [block for block in blocks if block.gated]
    if gated:
        worst = max(gated, key=_change)
        where = f"in tokens {worst.start}-{worst.stop}"
        yield gate_at_most(
            f"{kind}: state norm", _STATE_NORM, worst.state_norm_change or 0.0, limit, tolerance, where=where
        )
    if len(gated) < len(blocks):
        worst = max(blocks, key=_change)
        yield Check(
            name=f"{kind}: state norm, all positions",
            figure=_STATE_NORM,
            value=worst.state_norm_change,
            tolerance=tolerance,
        )


def _change(block: Block) -> float:
    """NaN is the worst."""
    change = block.state_norm_change
    return math.inf if change is None or math.isnan(change) else change


def _below(name: str, schedule: Schedule) -> str:
    return name if schedule.gated_tokens == schedule.tokens else f"{name}, positions below {schedule.gated_tokens}"
