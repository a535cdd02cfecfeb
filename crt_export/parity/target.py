"""One target through every regime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from crt_export.errors import ContractError
from crt_export.parity.case import ParityCase
from crt_export.parity.comparison import compare
from crt_export.parity.headroom import OBSERVED, largest_fp16_values
from crt_export.parity.metrics import Check, failed_check, measured
from crt_export.parity.reference import HANDOVER, PREFILL, PREFILL_PASS, STEP, Reference
from crt_export.parity.report import Comparison
from crt_export.parity.rollout import GRAPHS_OF_REGIME, Rollout
from crt_export.parity.scores import Scorer, Scores
from crt_export.parity.tolerances import Tolerances
from crt_export.parity.windows import ParityOptions
from crt_export.progress import Progress
from crt_export.spec import graph_names

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


def check_target(
    case: ParityCase,
    reference: Reference,
    options: ParityOptions,
    tolerances: Tolerances,
    progress: Progress,
) -> TargetResult:
    """Run every regime the model has; a regime that cannot run is a failed row.

    Args:
        case: The target.
        reference: PyTorch FP32 on the same windows.
        options: Batch and threads.
        tolerances: The limits.
        progress: Told what runs and how many windows are done.
    """
    config, windows = reference.model.config, reference.windows
    # PyTorch's count honours OMP_NUM_THREADS, so that checks that run side by side do not fight for the cores.
    threads = options.threads or torch.get_num_threads()
    rollout = Rollout(case, config, windows, window_batch=options.window_batch, threads=threads)
    found: dict[str, Comparison] = {}
    scores: dict[str, Scores] = {}
    for regime in (STEP, PREFILL, PREFILL_PASS, HANDOVER):
        if regime != HANDOVER and regime not in graph_names(config):
            continue
        scorer = Scorer(reference, regime, case.unroll, near_tie_margin=tolerances.near_tie_margin)
        label = f"{case.target}: {regime}"
        progress(label, 0, windows.count)
        problems = _run_regime(rollout, regime, scorer, lambda done, label=label: progress(label, done, windows.count))
        comparison = compare(_new_row(case, regime, windows.length), scorer.scores(), tolerances, problems)
        if comparison.statistics and not problems:
            scores[regime] = scorer.scores()
        found[regime] = comparison.judged(*_consistency(comparison, rollout.inconsistency.get(regime), tolerances))
    largest: dict[str, dict[str, float]] = {}
    rollout.release()
    if case.half:
        for name in OBSERVED:
            progress(f"{case.target}: FP16 values of {name}", 0, windows.count)
            found[name], largest[name] = _with_headroom(found[name], case, name, rollout, tolerances, threads)
    return TargetResult(comparisons=tuple(found.values()), scores=scores, largest_fp16=largest)


def _run_regime(rollout: Rollout, regime: str, scorer: Scorer, on_progress: Callable[[int], None]) -> list[str]:
    try:
        rollout.run(regime, scorer, on_progress)
    except ContractError as error:
        return [*scorer.problems, str(error)]
    return [*scorer.problems]


def _consistency(row: Comparison, largest: float | None, tolerances: Tolerances) -> tuple[Check, ...]:
    """Two forms of one computation inside a target; nothing where the regime has one form only."""
    if largest is None:
        return ()
    limit, name = tolerances.precisions[row.precision].consistency, f"{row.label}: consistency"
    return (measured("regime_consistency", name, largest, limit=limit, precision=row.precision),)


def _new_row(case: ParityCase, regime: str, length: int) -> Comparison:
    steps = {STEP: length, HANDOVER: length - length // 2}
    return Comparison(
        target=case.target,
        runtime="onnxruntime",
        graph="+".join(GRAPHS_OF_REGIME[regime]),
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
        values = largest_fp16_values(case, name, rollout.config, rollout.windows, batch=rollout.batch, threads=threads)
    except ContractError as error:
        return found.judged(failed_check(f"{name}: fp16_headroom", f"FP16 values could not be observed: {error}")), {}
    tensor, largest = next(iter(values.items()))
    limit = tolerances.fp16_headroom
    headroom = measured("fp16_headroom", f"{name}: fp16_headroom", largest, limit=limit, tensor=tensor)
    return found.judged(headroom), dict(list(values.items())[:_REPORTED_TENSORS])
