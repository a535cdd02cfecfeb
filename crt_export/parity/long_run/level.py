"""The level: both runs of one target, their checks and their data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crt_export.errors import ContractError
from crt_export.parity.levels import LONG_RUN
from crt_export.parity.long_run.blocks import Block, blocks_of_run, unit_errors
from crt_export.parity.long_run.gates import growth_checks, headroom_checks, run_checks, why_not_gated
from crt_export.parity.long_run.growth import Growth, growth_from_units
from crt_export.parity.long_run.headroom import LongHeadroom, observe_long_run
from crt_export.parity.long_run.reference import long_reference
from crt_export.parity.long_run.run import TargetRun, run_target
from crt_export.parity.long_run.schedule import SINGLE, Schedule, check_length, schedules
from crt_export.parity.metrics import METRICS, Check, failed_check
from crt_export.parity.report import LevelResult
from crt_export.parity.setup import ParityCase, ParitySetup

_REPORTED_TENSORS = 16


def check_long_run(case: ParityCase, setup: ParitySetup) -> LevelResult:
    """Decode a long text in one run and in chained windows, see :mod:`crt_export.parity.long_run`.

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
    reason = why_not_gated(schedule, growth, setup.config.recurrent)
    limit = None if reason else limits.growth
    checks += growth_checks(schedule, growth, limit, case.precision)
    headroom = observe_long_run(case, setup, schedule, reference) if case.half else None
    if headroom is not None:
        checks += headroom_checks(schedule, headroom, tolerances.fp16_headroom)
    figures = {
        "kind": schedule.kind,
        "tokens": schedule.tokens,
        "capacity": schedule.capacity,
        "trained": schedule.trained,
        "window": schedule.window,
        "blocks": [_block_data(block) for block in blocks],
        "growth": _growth_data(growth, schedule.tokens, limit),
        **_watch_data(run),
        **_headroom_data(headroom),
    }
    return checks, figures, _growth_notes(case, schedule, growth, reason)


def _growth_notes(case: ParityCase, schedule: Schedule, growth: Growth | None, reason: str) -> list[str]:
    if not reason or (schedule.kind == SINGLE and growth is not None):  # the single run's never is
        return []
    return [f"long run of {case.target}: the growth of the {schedule.kind} run is not gated: {reason}"]


def _block_data(block: Block) -> dict[str, Any]:
    return vars(block).copy()


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


def _watch_data(run: TargetRun) -> dict[str, Any]:
    return {"non_finite": run.non_finite, "first_non_finite": run.first_non_finite or None}


def _headroom_data(headroom: LongHeadroom | None) -> dict[str, Any]:
    if headroom is None:
        return {"headroom": None, "headroom_by_layer": None, "headroom_by_layer_trained": None}
    return {
        "headroom": dict(list(headroom.whole.items())[:_REPORTED_TENSORS]),
        "headroom_by_layer": headroom.by_layer(headroom.whole),
        "headroom_by_layer_trained": headroom.by_layer(headroom.trained),
    }
