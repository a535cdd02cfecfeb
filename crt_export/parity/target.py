"""One target through every regime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from crt_export.errors import ContractError
from crt_export.parity.case import ParityCase
from crt_export.parity.headroom import OBSERVED, largest_fp16_values
from crt_export.parity.reference import HANDOVER, PREFILL, PREFILL_PASS, STEP, Reference
from crt_export.parity.report import ParityRow
from crt_export.parity.rollout import GRAPHS_OF_REGIME, Rollout
from crt_export.parity.rows import row_from_scores
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
        rows: One per regime.
        scores: What was measured, per regime that ran to its end.
        largest_fp16: Per graph, the largest |value| of the FP16 tensors with the largest ones.
    """

    rows: tuple[ParityRow, ...]
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
    rows: dict[str, ParityRow] = {}
    scores: dict[str, Scores] = {}
    for regime in (STEP, PREFILL, PREFILL_PASS, HANDOVER):
        if regime != HANDOVER and regime not in graph_names(config):
            continue
        scorer = Scorer(reference, regime, case.unroll)
        label = f"{case.target}: {regime}"
        progress(label, 0, windows.count)
        problems = _run_regime(rollout, regime, scorer, lambda done, label=label: progress(label, done, windows.count))
        problems += _consistency_problems(rollout, regime, tolerances)
        row = dataclasses.replace(
            _new_row(case, regime, windows.length), inconsistency=rollout.inconsistency.get(regime)
        )
        rows[regime] = row_from_scores(row, scorer.scores(), tolerances, problems)
        if not problems and rows[regime].nll is not None:
            scores[regime] = scorer.scores()
    largest: dict[str, dict[str, float]] = {}
    if case.half:
        for name in OBSERVED:
            progress(f"{case.target}: FP16 values of {name}", 0, windows.count)
            rows[name], largest[name] = _with_headroom(rows[name], case, name, rollout, tolerances, threads)
    return TargetResult(rows=tuple(rows.values()), scores=scores, largest_fp16=largest)


def _run_regime(rollout: Rollout, regime: str, scorer: Scorer, on_progress: Callable[[int], None]) -> list[str]:
    try:
        rollout.run(regime, scorer, on_progress)
    except ContractError as error:
        return [*scorer.problems, str(error)]
    return [*scorer.problems]


def _consistency_problems(rollout: Rollout, regime: str, tolerances: Tolerances) -> list[str]:
    found = rollout.inconsistency.get(regime)
    limit = tolerances.precisions[rollout.case.precision].consistency
    if found is None or found <= limit:
        return []
    return [
        "two forms of the same computation (logits against head, prefill_pass against prefill) differ by "
        f"{found:.3g} of their largest value, the limit is {limit:g}"
    ]


def _new_row(case: ParityCase, regime: str, length: int) -> ParityRow:
    steps = {STEP: length, HANDOVER: length - length // 2}
    return ParityRow(
        target=case.target,
        runtime="onnxruntime",
        graph="+".join(GRAPHS_OF_REGIME[regime]),
        precision=case.precision,
        regime=regime,
        steps=steps.get(regime, case.unroll),
        arithmetic=case.arithmetic,
    )


def _with_headroom(
    row: ParityRow, case: ParityCase, name: str, rollout: Rollout, tolerances: Tolerances, threads: int
) -> tuple[ParityRow, dict[str, float]]:
    """Observe one FP16 graph and let its row answer for it."""
    if name not in case.graphs:
        return row, {}  # its row failed already, with that sentence
    try:
        values = largest_fp16_values(case, name, rollout.config, rollout.windows, batch=rollout.batch, threads=threads)
    except ContractError as error:
        failures = (*row.failures, f"FP16 values could not be observed: {error}")
        return dataclasses.replace(row, passed=False, failures=failures), {}
    tensor, largest = next(iter(values.items()))
    row = dataclasses.replace(row, largest_fp16=largest, largest_fp16_tensor=tensor)
    if not largest <= tolerances.fp16_headroom:
        failure = f"FP16 tensor {tensor} reaches {largest:.6g}, the limit is {tolerances.fp16_headroom:g}"
        row = dataclasses.replace(row, passed=False, failures=(*row.failures, failure))
    return row, dict(list(values.items())[:_REPORTED_TENSORS])
