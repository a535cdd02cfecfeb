"""Long run: does the error of a target grow over twenty thousand tokens?

``long_run_tokens`` tokens of the held-out text are decoded one by one, teacher-forced, in two ways, and PyTorch FP32
decodes the same tokens in the very same way:

``single``
    One uninterrupted run, positions 0, 1, 2 and so on, in a cache with room for all of it. Most of it lies beyond the
    training length, where no model promises anything, so it is gated below that length and reported above it. Where
    the target's capacity or the model's ``max_position_embeddings`` is smaller, the run ends there and a note says so;
    a model with an attention window goes on by the runtime's rule of eviction (:mod:`crt_export.runtime.caches`)
    instead, while PyTorch goes on counting.

``chained``
    Windows of the training length, one after the other through the text. **The rule**: every window starts at position
    0 with an emptied cache, and the recurrent state h of the last token before it is carried over, so the run is one
    recurrence from its first token to its last while no position reaches the training length. A plain transformer has
    no state, so nothing is carried and its windows are independent. Where the training length is not known, windows
    have 256 tokens, or as many as positions or capacity allow. All of it is gated.

Gates: no NaN or infinity at any step (the first one is named: step, position, tensor); the norm of the state, block by
block; the relative error of the logits below the training length; by how much that error grows over the chained run;
and for targets that compute in FP16 the largest |value| of every tensor, gathered by layer.

The growth is a straight line through the errors of units of a window, or of a 32nd of the run where that is less
(:mod:`crt_export.parity.long_run.figures`). It is reported as a rate per 1,000 tokens and gated against the run's own
error: the upper end of the rate's 95 % interval, times the run's length, over the run's mean error. 0.5 is an error
that ends at 5/3 of where it began, 1 at three times that, and 2 is one that began at nothing. Text drifts too, and the
more so the shorter the run: stretches of the demo's text give an upper end of up to 0.50 over 4,000 tokens, 0.42 over
8,000 and 0.28 over 12,000, from which on it is gated. A plain transformer carries nothing from window to window: its
growth shows the text alone and is reported, not gated. What is not gated is a check without a verdict, and for the
chained run a note.

``data`` of the level::

    {"runs": [{"kind": "single" | "chained", "tokens", "capacity", "trained": n | null, "window": n | null,
      "blocks": [{"start", "stop", "nll", "reference_nll", "relative_error", "kl", "top1_agreement",
                  "state_norm", "reference_state_norm", "state_error", "gated": bool}],
      "growth": {"figure", "per_1000_tokens", "ci": [low, high], "limit", "gated": bool,
                 "mean_error", "over_run", "over_run_ci": [low, high], "over_run_limit",
                 "units", "unit_tokens", "autocorrelation"} | null,
      "non_finite": steps, "first_non_finite": text | null,
      "headroom": {tensor: largest |value|}, "headroom_by_layer": {"layers.0": value},
      "headroom_by_layer_trained": {"layers.0": value below the training length}}]}

``growth``: ``over_run`` and ``over_run_ci`` are the growth over the whole run in units of ``mean_error``; ``limit`` is
``over_run_limit`` in the units of ``ci``, per 1,000 tokens. Blocks have 1,000 tokens; the single run has finer ones
below the training length. ``nll``, ``kl``: nats per token. ``relative_error``: mean |logit difference| over the
standard deviation of the reference's logits. ``top1_agreement``: share of the tokens that are no near tie in the
reference. ``state_norm``: mean Euclidean norm of h; ``state_error``: mean norm of the difference over the mean norm of
the reference's. ``headroom`` has the sixteen largest tensors and is null where the target does not compute in FP16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crt_export.errors import ContractError
from crt_export.parity.levels import LONG_RUN
from crt_export.parity.long_run.figures import (
    SMALLEST_UNITS,
    Block,
    Growth,
    blocks_of_run,
    growth_from_units,
    relative_error,
    unit_errors,
)
from crt_export.parity.long_run.run import LongHeadroom, TargetRun, observe_long_run, run_target
from crt_export.parity.long_run.schedule import CHAINED, Schedule, check_length, long_reference, schedules
from crt_export.parity.metrics import METRICS, Check, claim, failed_check, measured
from crt_export.parity.report import LevelResult
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.parity.tolerances import Tolerances

#: Over fewer tokens the interval is wide and the text's own drift near the limit, see above.
GATED_GROWTH_TOKENS = 12_000
_REPORTED_TENSORS = 16


def check_long_run(case: ParityCase, setup: ParitySetup) -> LevelResult:
    """Decode a long text in one run and in chained windows.

    Args:
        case: The target.
        setup: Text, reference, limits, and how many tokens (``options.long_run_tokens``).

    Raises:
        InputError: The text is too short; the message says what is needed.
    """
    check_length(setup.text, setup.options.long_run_tokens)
    runs, notes = schedules(case, setup.config, setup.options.long_run_tokens)
    checks: list[Check] = []
    data: list[Mapping[str, Any]] = []
    for schedule in runs:
        try:
            found, figures, remarks = _check_run(case, setup, schedule)
        except ContractError as error:
            checks.append(failed_check(f"{schedule.kind}: runs", str(error)))
            continue
        checks += found
        data.append(figures)
        notes += remarks
    return LevelResult(
        level=LONG_RUN, target=case.target, checks=tuple(checks), data={"runs": data}, notes=tuple(notes)
    )


def _check_run(
    case: ParityCase, setup: ParitySetup, schedule: Schedule
) -> tuple[list[Check], dict[str, Any], list[str]]:
    """One run: its checks, its entry in the data, and what its growth does not say."""
    tolerances, limits = setup.tolerances, setup.limits(case.precision)
    reference = long_reference(setup, schedule)
    run = run_target(setup.runner(case), setup, schedule, reference)
    blocks = blocks_of_run(run, schedule, tolerances.near_tie_margin)
    growth = growth_from_units(unit_errors(run, schedule.unit), schedule.unit)
    checks = [*run_checks(run, schedule, blocks, case.precision, tolerances)]
    reason = why_not_gated(schedule, growth, bool(setup.config.carried.states))
    limit = None if reason else limits.growth
    checks += growth_checks(schedule, growth, limit, case.precision)
    headroom = observe_long_run(case, setup, schedule, reference.windows.inputs) if case.half else None
    if headroom is not None:
        checks += headroom_checks(schedule, headroom, tolerances.fp16_headroom)
    figures = {
        "kind": schedule.kind,
        "tokens": schedule.tokens,
        "capacity": schedule.capacity,
        "trained": schedule.trained,
        "window": schedule.window,
        "blocks": [dict(vars(block)) for block in blocks],
        "growth": _growth_data(growth, schedule.tokens, limit),
        "non_finite": run.non_finite,
        "first_non_finite": run.first_non_finite or None,
        **_headroom_data(headroom),
    }
    notes = []
    if reason and (schedule.kind == CHAINED or growth is None):  # the single run's never is gated
        notes.append(f"long run of {case.target}: the growth of the {schedule.kind} run is not gated: {reason}")
    return checks, figures, notes


def _growth_data(growth: Growth | None, tokens: int, limit: float | None) -> dict[str, Any] | None:
    if growth is None:
        return None
    low, value, high = growth.over(tokens)
    return {
        "figure": METRICS["growth_rate"].figure,
        "per_1000_tokens": growth.slope,
        "ci": (growth.low, growth.high),
        "limit": None if limit is None else limit * growth.mean * 1000 / tokens,
        "gated": limit is not None,
        "mean_error": growth.mean,
        "over_run": value,
        "over_run_ci": (low, high),
        "over_run_limit": limit,
        "units": growth.units,
        "unit_tokens": growth.unit_tokens,
        "autocorrelation": growth.autocorrelation,
    }


def _headroom_data(headroom: LongHeadroom | None) -> dict[str, Any]:
    if headroom is None:
        return {"headroom": None, "headroom_by_layer": None, "headroom_by_layer_trained": None}
    return {
        "headroom": dict(list(headroom.whole.items())[:_REPORTED_TENSORS]),
        "headroom_by_layer": headroom.by_layer(headroom.whole),
        "headroom_by_layer_trained": headroom.by_layer(headroom.trained),
    }


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
    name, gated = f"{kind}: logit error", schedule.gated_tokens
    beyond = gated < schedule.tokens
    if gated:
        below = f"{name}, positions below {gated}" if beyond else name
        value, limit = relative_error(run, gated), limits.relative_logit_error
        yield measured("run_logit_error", below, value, limit=limit, precision=precision)
    if beyond:
        value = relative_error(run, schedule.tokens)
        yield measured("run_logit_error", f"{name}, all positions", value, precision=precision)


def why_not_gated(schedule: Schedule, growth: Growth | None, stateful: bool) -> str:
    """Why the growth of a run is no gate, as the end of a sentence; empty where it is one."""
    if growth is None:
        return f"it cannot be given, {schedule.tokens:,} tokens are too few for {SMALLEST_UNITS} observations"
    if schedule.kind != CHAINED:
        return "positions above the training length are in it"
    if not stateful:
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
