"""Compare every graph of every target with PyTorch FP32 on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.environment import installed_versions
from crt_export.errors import InputError
from crt_export.model import model_from_checkpoint
from crt_export.parity.case import ParityCase
from crt_export.parity.gap import reference_gap_rows, target_gap_rows
from crt_export.parity.half import half_row
from crt_export.parity.reference import HANDOVER, PREFILL, STEP, Reference, first_position
from crt_export.parity.report import ParityReport, ParityRow
from crt_export.parity.statistics import METHOD
from crt_export.parity.target import check_target
from crt_export.parity.tolerances import Tolerances, load_tolerances
from crt_export.parity.windows import ParityOptions, Windows, windows_from_text
from crt_export.progress import Progress, no_progress
from crt_export.quantize.plan import W8A8Plan
from crt_export.text import TokenText

_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")


def check_parity(
    checkpoint: Checkpoint,
    cases: Sequence[ParityCase],
    text: TokenText,
    *,
    options: ParityOptions | None = None,
    tolerances: Tolerances | None = None,
    plan: W8A8Plan | None = None,
    progress: Progress = no_progress,
) -> ParityReport:
    """Run every target through every regime and compare it with the same regime in PyTorch FP32.

    Args:
        checkpoint: The reference, read by :func:`crt_export.checkpoint.load_checkpoint`.
        cases: The targets.
        text: Held-out text; none of it may have been calibrated on.
        options: How much to measure.
        tolerances: Limits; None reads ``validate/tolerances.toml``.
        plan: What the W8A8 graphs were made of, to run them in real FP16 arithmetic too; None notes that it did not.
        progress: Told what runs and how many windows are done.

    Returns:
        The report; ``passed`` says whether every gate held. A graph that cannot run is a failed row, not an error.

    Raises:
        InputError: There is no target, or the text is too short.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    if not cases:
        raise InputError("parity needs at least one target")
    options = options or ParityOptions()
    tolerances = tolerances or load_tolerances()
    windows = windows_from_text(text, options, **_longest_window(cases, checkpoint.config))
    reference = _reference(checkpoint, cases, windows, options, progress)
    rows, notes = _half_rows(checkpoint, cases, reference, tolerances, plan, progress)
    target_rows, largest = _target_rows(cases, reference, options, tolerances, progress)
    rows += target_rows
    return ParityReport(
        rows=tuple(rows),
        tolerances=tolerances.to_dict(),
        text=_text_identity(windows),
        notes=(*windows.notes, *notes, *_coverage_notes(rows, windows)),
        method=METHOD,
        versions=installed_versions(_LIBRARIES),
        largest_fp16=largest,
    )


def _reference(
    checkpoint: Checkpoint,
    cases: Sequence[ParityCase],
    windows: Windows,
    options: ParityOptions,
    progress: Progress,
) -> Reference:
    """PyTorch FP32 with the hidden states of every regime that a target will be compared in."""
    reference = Reference(model_from_checkpoint(checkpoint), windows, batch=options.window_batch)
    for regime in (STEP, PREFILL, HANDOVER):
        progress(f"PyTorch FP32: {regime}", 0, windows.count)
        for passes in sorted({case.unroll for case in cases}):
            reference.hidden(regime, passes)
    return reference


def _half_rows(
    checkpoint: Checkpoint,
    cases: Sequence[ParityCase],
    reference: Reference,
    tolerances: Tolerances,
    plan: W8A8Plan | None,
    progress: Progress,
) -> tuple[list[ParityRow], list[str]]:
    """A row of real FP16 arithmetic per residual dtype of the half-precision targets, W8A8 on its own, and notes."""
    quantized = {case.residual_dtype for case in cases if case.precision == "w8a8"}
    wanted: list[tuple[str, W8A8Plan | None]] = [
        (dtype, None) for dtype in sorted({case.residual_dtype for case in cases if case.half})
    ]
    wanted += [(dtype, plan) for dtype in sorted(quantized) if plan is not None]
    rows, notes = [], []
    for residual_dtype, form in wanted:
        row, found = half_row(checkpoint, reference, residual_dtype, tolerances, progress, plan=form)
        rows.append(row)
        notes += [note for note in found if note not in notes]
    if quantized and plan is None:
        notes.append(
            "pytorch-half ran plain FP16 and not W8A8: a bundle holds the graphs, not the plan they were made of; "
            "the largest FP16 values of the W8A8 graphs were observed all the same"
        )
    return rows, notes


def _target_rows(
    cases: Sequence[ParityCase],
    reference: Reference,
    options: ParityOptions,
    tolerances: Tolerances,
    progress: Progress,
) -> tuple[list[ParityRow], dict[str, Mapping[str, Mapping[str, float]]]]:
    """The reference's own regime gap, every target's rows, and the largest FP16 values by target."""
    progress("PyTorch FP32: regime gap", 0, reference.windows.count)
    gaps = {passes: reference_gap_rows(reference, passes) for passes in sorted({case.unroll for case in cases})}
    rows = [row for gap in gaps.values() for row, _ in gap]
    largest = {}
    for case in cases:
        result = check_target(case, reference, options, tolerances, progress)
        own_gaps = target_gap_rows(case, result, gaps[case.unroll], tolerances, reference.model.config)
        rows += [*result.rows, *own_gaps, *_compiled(case)]
        if result.largest_fp16:
            largest[case.target] = result.largest_fp16
    return rows, largest


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


def _longest_window(cases: Sequence[ParityCase], config: ModelConfig) -> dict:
    """The longest window that every target can take, and what says so."""
    limits = {f"capacity of {case.target}": case.capacity for case in cases if case.capacity is not None}
    limits["max_position_embeddings of the model"] = config.max_position_embeddings
    reason = min(limits, key=lambda name: limits[name])
    return {"longest": limits[reason], "longest_reason": f"{reason} is {limits[reason]}"}


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


def _text_identity(windows: Windows) -> dict:
    return {
        "source": windows.text.source,
        "sha256": windows.text.sha256,
        "offset": windows.text.offset,
        "tokens": len(windows.text),
        "windows": windows.count,
        "window": windows.length,
    }
