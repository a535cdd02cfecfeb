"""One target through every regime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crt_export.errors import ContractError
from crt_export.parity.comparison import compare
from crt_export.parity.headroom import OBSERVED, largest_fp16_values
from crt_export.parity.metrics import Check, failed_check, measured
from crt_export.parity.reference import HANDOVER, PREFILL, PREFILL_PASS, STEP
from crt_export.parity.report import Comparison
from crt_export.parity.rollout import Rollout
from crt_export.parity.runner import Runner
from crt_export.parity.scores import Scorer, Scores
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.parity.tolerances import Tolerances
from crt_export.progress import Progress

_REPORTED_TENSORS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetResult:
    """What one target gave.

    Attributes:
        comparisons: One per regime.
        scores: What was measured, per regime that ran to its end.
        largest_fp16: Per graph, the largest |value| of the FP16 tensors with the largest ones.
    """

    comparisons: tuple[Comparison, ...]
    scores: Mapping[str, Scores]
    largest_fp16: Mapping[str, Mapping[str, float]]


def check_target(case: ParityCase, setup: ParitySetup) -> TargetResult:
    """Run every regime the target has; a regime that cannot run is a failed row.

    Where one graph makes steps and passes alike, ``prefill`` is K calls of it, and there is no ``prefill_pass`` beside.

    Args:
        case: The target.
        setup: Reference and windows, batch and limits.
    """
    tolerances, windows = setup.tolerances, setup.windows
    found: dict[str, Comparison] = {}
    scores: dict[str, Scores] = {}
    try:
        runner = setup.runner(case)
    except ContractError as error:
        for regime in (STEP, PREFILL, HANDOVER):
            row = _new_row(case, regime, windows.length, regime)
            nothing = Scorer(setup.reference, regime, case.unroll).scores()
            found[regime] = compare(row, nothing, tolerances, [str(error)])
        return TargetResult(comparisons=tuple(found.values()), scores=scores, largest_fp16={})
    rollout = Rollout(runner, case, windows, window_batch=setup.options.window_batch)
    separate = setup.config.recurrent and not runner.one_graph
    for regime in (STEP, PREFILL, *((PREFILL_PASS,) if separate else ()), HANDOVER):
        scorer = Scorer(setup.reference, regime, case.unroll, near_tie_margin=tolerances.near_tie_margin)
        problems = _run_regime(rollout, regime, scorer, setup.progress)
        row = _new_row(case, regime, windows.length, _graphs(runner, regime))
        comparison = compare(row, scorer.scores(), tolerances, problems)
        if comparison.statistics and not problems:
            scores[regime] = scorer.scores()
        found[regime] = comparison.judged(*_consistency(comparison, rollout.inconsistency.get(regime), tolerances))
    largest: dict[str, dict[str, float]] = {}
    if case.half:
        for name in OBSERVED:
            setup.progress(f"{case.target}: FP16 values of {name}", 0, windows.count)
            found[name], largest[name] = _with_headroom(found[name], case, name, rollout, tolerances, setup.threads)
    return TargetResult(comparisons=tuple(found.values()), scores=scores, largest_fp16=largest)


def _run_regime(rollout: Rollout, regime: str, scorer: Scorer, progress: Progress) -> list[str]:
    label, count = f"{rollout.case.target}: {regime}", rollout.windows.count
    progress(label, 0, count)
    try:
        rollout.run(regime, scorer, lambda done: progress(label, done, count))
    except ContractError as error:
        return [*scorer.problems, str(error)]
    return [*scorer.problems]


def _graphs(runner: Runner, regime: str) -> str:
    """Graphs that a regime runs, in the order they run, joined with ``+``."""
    if regime == HANDOVER:
        return "+".join(dict.fromkeys((runner.graph_name(PREFILL), runner.graph_name(STEP))))
    return runner.graph_name(regime) + ("" if regime == STEP else "+head")


def _consistency(row: Comparison, largest: float | None, tolerances: Tolerances) -> tuple[Check, ...]:
    """Two forms of one computation inside a target; nothing where the regime has one form only."""
    if largest is None:
        return ()
    limit, name = tolerances.precisions[row.precision].consistency, f"{row.label}: consistency"
    return (measured("regime_consistency", name, largest, limit=limit, precision=row.precision),)


def _new_row(case: ParityCase, regime: str, length: int, graph: str) -> Comparison:
    steps = {STEP: length, HANDOVER: length - length // 2}
    return Comparison(
        target=case.target,
        runtime="onnxruntime",
        graph=graph,
        precision=case.precision,
        regime=regime,
        steps=steps.get(regime, case.unroll),
        arithmetic=case.arithmetic,
    )


def _with_headroom(
    found: Comparison, case: ParityCase, name: str, rollout: Rollout, tolerances: Tolerances, threads: int
) -> tuple[Comparison, dict[str, float]]:
    """Observe one FP16 graph and let its row answer for it."""
    if name not in case.graphs:
        return found, {}  # its row failed already, with that sentence
    try:
        values = largest_fp16_values(rollout.runner, case, name, rollout.windows, batch=rollout.batch, threads=threads)
    except ContractError as error:
        return found.judged(failed_check(f"{name}: fp16_headroom", f"FP16 values could not be observed: {error}")), {}
    tensor, largest = next(iter(values.items()))
    limit = tolerances.fp16_headroom
    headroom = measured("fp16_headroom", f"{name}: fp16_headroom", largest, limit=limit, tensor=tensor)
    return found.judged(headroom), dict(list(values.items())[:_REPORTED_TENSORS])
