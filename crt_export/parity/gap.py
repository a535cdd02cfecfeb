"""The regime gap: how far K parallel passes are from the exact recurrence, in PyTorch FP32 and in every target.

The gap of the reference belongs to the model and gates nothing. A target is judged by how much larger its own gap is,
on positions below the length the model was trained at; above that it is reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crt_export.config import ModelConfig
from crt_export.parity.case import ParityCase
from crt_export.parity.reference import PREFILL, STEP, Reference
from crt_export.parity.report import ParityRow
from crt_export.parity.rows import GAP, Comparison, gap_row, gate_gap
from crt_export.parity.scores import reference_nll
from crt_export.parity.target import TargetResult
from crt_export.parity.tolerances import Tolerances

GapRow = tuple[ParityRow, np.ndarray]


def spans(length: int, trained: int | None) -> list[slice]:
    """Positions of a window below and above the training length; all of them where it is not known."""
    if trained is None or trained >= length:
        return [slice(0, length)]
    return [slice(0, trained), slice(trained, length)]


def reference_gap_rows(reference: Reference, passes: int) -> list[GapRow]:
    """The model's own gap: one row per span, and the paired differences it stands on."""
    step, prefill = (reference_nll(reference, regime, passes) for regime in (STEP, PREFILL))
    row = ParityRow(
        target="pytorch-fp32",
        runtime="pytorch",
        graph="model",
        precision="fp32",
        regime=GAP,
        steps=passes,
        arithmetic="fp32",
    )
    trained = reference.model.config.training_sequence_length
    return [gap_row(row, step, prefill, span) for span in spans(reference.windows.length, trained)]


def target_gaps(
    case: ParityCase,
    result: TargetResult,
    reference_gaps: Sequence[GapRow],
    tolerances: Tolerances,
    config: ModelConfig,
) -> list[Comparison]:
    """The gap of one target per span; none where a regime it compares did not run, which is a failed row already."""
    if STEP not in result.scores or PREFILL not in result.scores:
        return []
    step, prefill = result.scores[STEP], result.scores[PREFILL]
    row = ParityRow(
        target=case.target,
        runtime="onnxruntime",
        graph="prefill+head,step",
        precision=case.precision,
        regime=GAP,
        steps=case.unroll,
        arithmetic=case.arithmetic,
    )
    limit = tolerances.precisions[case.precision].gap_delta_nll
    comparisons = []
    for reference_row, reference_gap in reference_gaps:
        assert reference_row.positions is not None
        span = slice(*reference_row.positions)
        own, gap = gap_row(row, step.nll, prefill.nll, span)
        trained = config.training_sequence_length
        gated = step.better_than_chance and (trained is None or span.stop <= trained)
        comparisons.append(gate_gap(own, gap, reference_gap, limit if gated else None))
    return comparisons
