"""L3: likelihood, divergence and agreement on a text, for every graph of every target, with confidence intervals.

Each regime of a target is compared with the same regime of PyTorch FP32; the gap between the regimes is a row of its
own. Whether the text is one the model knows is a check of its own, of ``pytorch-fp32``. ``data`` of the level: see
:class:`crt_export.parity.report.Comparison`, :mod:`crt_export.parity.corpus_statistics` and
:func:`crt_export.parity.text_gate.check_text`; ``largest_fp16``: per graph, the largest |value| of the largest FP16
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crt_export.parity.comparison import reference_gaps, target_gaps
from crt_export.parity.half import compare_half
from crt_export.parity.reference import HANDOVER, PREFILL, STEP, first_position
from crt_export.parity.report import COMPILED, Comparison, LevelResult, corpus_result
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.parity.target import check_target
from crt_export.parity.text_gate import check_text
from crt_export.parity.windows import Windows


def check_corpus(cases: Sequence[ParityCase], setup: ParitySetup) -> list[LevelResult]:
    """Run every regime of every target over all windows.

    Args:
        cases: The targets.
        setup: Reference, text and limits.
    """
    halves, notes = _halves(cases, setup)
    setup.progress("PyTorch FP32: regime gap", 0, setup.windows.count)
    gaps = {passes: reference_gaps(setup.reference, passes) for passes in sorted({case.unroll for case in cases})}
    results = [corpus_result("pytorch-half", halves, notes=notes)] if halves else []
    for case in cases:
        found = check_target(case, setup)
        graphs = {row.regime: row.graph for row in found.comparisons}
        own = list(found.comparisons)
        own += target_gaps(
            case,
            f"{graphs[PREFILL]},{graphs[STEP]}",
            found.scores,
            gaps[case.unroll],
            setup.tolerances,
            setup.config.training_sequence_length,
        )
        data: dict[str, Any] = {"largest_fp16": found.largest_fp16} if found.largest_fp16 else {}
        results.append(corpus_result(case.target, [*own, *_compiled(case)], **data))
    nll = _reference_nll([gap.comparison for gap in next(iter(gaps.values()))])
    reference = [gap.comparison for of_passes in gaps.values() for gap in of_passes]
    notes = _coverage_notes([row for result in results for row in result.comparisons], setup.windows)
    results.append(check_text(setup, nll, reference, notes=notes))
    return results


def _reference_nll(gaps: Sequence[Comparison]) -> float:
    """Of the step chain over whole windows: a gap covers some positions, and has the steps as its reference."""
    return sum((row.reference_nll or 0.0) * row.tokens for row in gaps) / sum(row.tokens for row in gaps)


def _halves(cases: Sequence[ParityCase], setup: ParitySetup) -> tuple[list[Comparison], list[str]]:
    """Real FP16 arithmetic: one per residual dtype of the half-precision targets, W8A8 on its own, and notes."""
    plain = dict.fromkeys(sorted({case.residual_dtype for case in cases if case.half}))
    quantized = {case.residual_dtype: case.plan for case in cases if case.plan is not None}
    halves, notes = [], []
    for residual_dtype, plan in (*plain.items(), *sorted(quantized.items())):
        half, found = compare_half(
            setup.checkpoint, setup.reference, residual_dtype, setup.tolerances, setup.progress, plan=plan
        )
        halves.append(half)
        notes += [note for note in found if note not in notes]
    return halves, notes


def _coverage_notes(rows: Sequence[Comparison], windows: Windows) -> list[str]:
    """What the rows do not cover: the first half of the windows in the hand-over, likelihoods that gate nothing."""
    positions = windows.length - first_position(HANDOVER, windows.length)
    notes = [
        f"handover rows score the second half of each window, from the last token of prefill on: "
        f"{windows.count * positions:,} of {windows.count * windows.length:,} tokens"
    ]
    ungated = [row for row in rows if row.better_than_chance is False]
    if ungated:
        worst = max(row.reference_nll or 0.0 for row in ungated)
        notes.append(
            f"delta nll is reported but not gated in {len(ungated)} rows, nor in their regime gaps: PyTorch FP32 "
            f"predicts this text worse than a uniform guess would (up to {worst:.3f} nat per token), and there a "
            "rounding error shifts the mean to first order; logit errors and top-1 are gated"
        )
    return notes


def _compiled(case: ParityCase) -> list[Comparison]:
    """Engines that were compiled and cannot run here: listed, never passed."""
    return [
        Comparison(
            target=case.target,
            runtime=case.runtime,
            graph=graph,
            precision=case.precision,
            regime=graph,
            label=f"{graph} ({COMPILED})",
            status=COMPILED,
        )
        for graph in case.compiled
    ]
