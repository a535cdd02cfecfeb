"""Gates of a long run: the checks of one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from crt_export.parity.long_run.blocks import Block, relative_error
from crt_export.parity.long_run.growth import SMALLEST_UNITS, Growth
from crt_export.parity.long_run.headroom import LongHeadroom
from crt_export.parity.long_run.run import TargetRun
from crt_export.parity.long_run.schedule import CHAINED, Schedule
from crt_export.parity.metrics import METRICS, Check, claim, measured
from crt_export.parity.tolerances import Tolerances

#: Over fewer tokens the interval is wide and the text's own drift near the limit, see the package.
GATED_GROWTH_TOKENS = 12_000


def run_checks(
    run: TargetRun, schedule: Schedule, blocks: Sequence[Block], precision: str, tolerances: Tolerances
) -> Iterator[Check]:
    """NaN watch, positions, state norm and logit error of one run; below the training length they are gates."""
    kind, limits = schedule.kind, tolerances.precisions[precision]
    # At any position: an overflow above the training length is a fault of the export too.
    failures = [f"first at {run.first_non_finite}"] if run.first_non_finite else []
    yield measured("non_finite", f"{kind}: NaN and infinity", run.non_finite, limit=0.0, failures=failures)
    yield claim(f"{kind}: positions", [run.wrong_position] if run.wrong_position else [])
    if any(block.state_norm is not None for block in blocks):
        yield from _state_norm_checks(kind, blocks, limits.state_norm, precision)
    name = f"{kind}: logit error"
    gated = schedule.gated_tokens
    if gated:
        value = relative_error(run, gated)
        limit = limits.relative_logit_error
        yield measured("run_logit_error", _below(name, schedule), value, limit=limit, precision=precision)
    if gated < schedule.tokens:
        value = relative_error(run, schedule.tokens)
        yield measured("run_logit_error", f"{name}, all positions", value, precision=precision)


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


def growth_checks(schedule: Schedule, growth: Growth | None, limit: float | None, precision: str) -> tuple[Check, ...]:
    """The growth of one run over its mean error, a gate on the upper end of its interval, and its rate.

    Args:
        schedule: The run.
        growth: Its growth; None where it cannot be given, which is a check too, so that nobody takes it for held.
        limit: What the growth over the run may be of the mean error; None reports only.
        precision: Whose limit that is.
    """
    name = f"{schedule.kind}: growth"
    if growth is None:
        return (measured("growth", name, None, precision=precision),)
    low, value, high = growth.over(schedule.tokens)
    interval = (growth.low, growth.high)
    rate = measured("growth_rate", f"{name} per 1,000 tokens", growth.slope, interval=interval)
    if limit is None:
        return measured("growth", name, value, interval=(low, high), precision=precision), rate
    passed = high <= limit
    sentence = (
        f"{METRICS['growth'].figure} is {value:.3g}, 95 % interval [{low:.3g}, {high:.3g}] over "
        f"{schedule.tokens:,} tokens in units of "
        f"{growth.unit_tokens}; its upper end is expected to be at most {limit:g} ({precision}.growth)"
    )
    failures = () if passed else (sentence,)
    gate = measured("growth", name, value, interval=(low, high), limit=limit, precision=precision, failures=failures)
    return gate, rate


def headroom_checks(schedule: Schedule, headroom: LongHeadroom, limit: float) -> Iterator[Check]:
    """FP16 headroom of every layer below the training length, and the largest value of all positions."""
    name = f"{schedule.kind}: FP16 headroom"
    for layer, value in headroom.by_layer(headroom.trained).items():
        tensor = max((t for t in headroom.trained if headroom.layers[t] == layer), key=lambda t: headroom.trained[t])
        yield measured("run_headroom", f"{name}, {layer}", value, limit=limit, where=f"in tensor {tensor}")
    if schedule.gated_tokens < schedule.tokens:
        tensor, value = next(iter(headroom.whole.items()))
        yield measured("run_headroom", f"{name}, all positions ({tensor})", value)


def _state_norm_checks(kind: str, blocks: Sequence[Block], limit: float, precision: str) -> Iterator[Check]:
    gated = [block for block in blocks if block.gated]
    if gated:
        worst = max(gated, key=_change)
        where = f"in tokens {worst.start}-{worst.stop}"
        change = worst.state_norm_change or 0.0
        yield measured("state_norm", f"{kind}: state norm", change, limit=limit, precision=precision, where=where)
    if len(gated) < len(blocks):
        worst = max(blocks, key=_change)
        name = f"{kind}: state norm, all positions"
        yield measured("state_norm", name, worst.state_norm_change, precision=precision)


def _change(block: Block) -> float:
    """NaN is the worst."""
    change = block.state_norm_change
    return math.inf if change is None or math.isnan(change) else change


def _below(name: str, schedule: Schedule) -> str:
    return name if schedule.gated_tokens == schedule.tokens else f"{name}, positions below {schedule.gated_tokens}"
