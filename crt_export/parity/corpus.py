"""L3: likelihood, divergence and agreement on a text, for every graph of every target, with confidence intervals.

Each regime of a target is compared with the same regime of PyTorch FP32; the gap between the regimes is a row of its
own. Whether the text is one the model knows is a check of its own, of ``pytorch-fp32``. ``data`` of the level: see
:func:`corpus_result` and :func:`crt_export.parity.text_gate.check_text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crt_export.ladder import CORPUS
from crt_export.parity.case import ParityCase
from crt_export.parity.gap import reference_gap_rows, target_gaps
from crt_export.parity.half import compare_half
from crt_export.parity.level import LevelResult, ParitySetup
from crt_export.parity.reference import HANDOVER, first_position
from crt_export.parity.report import ParityRow
from crt_export.parity.rows import Comparison
from crt_export.parity.target import check_target
from crt_export.parity.text_gate import check_text
from crt_export.parity.windows import Windows


@dataclass(frozen=True, kw_only=True)
class CorpusResult:
    """Rows of all targets, what each level result says of them, notes, and the largest FP16 values by target."""

    rows: tuple[ParityRow, ...]
    levels: tuple[LevelResult, ...]
    notes: tuple[str, ...]
    largest_fp16: Mapping[str, Mapping[str, Mapping[str, float]]]


def check_corpus(cases: Sequence[ParityCase], setup: ParitySetup) -> CorpusResult:
    """Run every regime of every target over all windows.

    Args:
        cases: The targets.
        setup: Reference, text and limits.
    """
    halves, notes = _halves(cases, setup)
    rows = [half.row for half in halves]
    levels = [corpus_result("pytorch-half", halves)] if halves else []
    setup.progress("PyTorch FP32: regime gap", 0, setup.windows.count)
    gaps = {passes: reference_gap_rows(setup.reference, passes) for passes in sorted({case.unroll for case in cases})}
    rows += [row for gap in gaps.values() for row, _ in gap]
    levels.append(check_text(setup, _reference_nll([row for row, _ in next(iter(gaps.values()))])))
    largest = {}
    for case in cases:
        result = check_target(case, setup.reference, setup.options, setup.tolerances, setup.progress)
        own = [*result.comparisons, *target_gaps(case, result, gaps[case.unroll], setup.tolerances, setup.config)]
        rows += [*(comparison.row for comparison in own), *_compiled(case)]
        levels.append(corpus_result(case.target, own))
        if result.largest_fp16:
            largest[case.target] = result.largest_fp16
    notes += _coverage_notes(rows, setup.windows)
    return CorpusResult(rows=tuple(rows), levels=tuple(levels), notes=tuple(notes), largest_fp16=largest)


def corpus_result(target: str, comparisons: Sequence[Comparison]) -> LevelResult:
    """The level's answer about one target: the checks that its rows stand on.

    ``data``: ``regimes``, by the label of each comparison that ran to its end, what
    :mod:`crt_export.parity.corpus_statistics` lists.
    """
    return LevelResult(
        level=CORPUS,
        target=target,
        checks=tuple(check for comparison in comparisons for check in comparison.checks),
        data={"regimes": {item.label: item.figures for item in comparisons if item.figures is not None}},
    )


def _reference_nll(gaps: Sequence[ParityRow]) -> float:
    """Of the step chain over whole windows: a gap row covers some positions, and has the steps as its reference."""
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


def _coverage_notes(rows: Sequence[ParityRow], windows: Windows) -> list[str]:
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


def _compiled(case: ParityCase) -> list[ParityRow]:
    """Engines that were compiled and cannot run here: listed, never passed."""
    return [
        ParityRow(
            target=case.target,
            runtime=case.runtime,
            graph=graph,
            precision=case.precision,
            regime=graph,
            status="compiled",
        )
        for graph in case.compiled
    ]
