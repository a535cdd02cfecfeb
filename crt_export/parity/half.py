"""The step chain on the half-precision PyTorch model: real FP16 arithmetic, which ONNX Runtime's CPU provider lacks."""

from __future__ import annotations

import torch

from crt_export.checkpoint import Checkpoint
from crt_export.errors import UnsupportedError
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity.comparison import compare
from crt_export.parity.reference import STEP, Reference
from crt_export.parity.report import Comparison
from crt_export.parity.scores import BLOCK_ELEMENTS, Scorer
from crt_export.parity.tolerances import Tolerances
from crt_export.progress import Progress
from crt_export.quantize.emulation import emulate_fp16, emulate_w8a8
from crt_export.quantize.plan import W8A8Plan, quantize_linears

_DTYPES = {"float16": torch.float16, "float32": torch.float32}
#: Half-precision attention is slow on a CPU, and every target is compared on all windows: larger models run fewer here.
_LARGE_MODEL = 20_000_000
_WINDOWS_OF_LARGE_MODEL = 4


def compare_half(
    checkpoint: Checkpoint,
    reference: Reference,
    residual_dtype: str,
    tolerances: Tolerances,
    progress: Progress,
    *,
    plan: W8A8Plan | None = None,
) -> tuple[Comparison, list[str]]:
    """Run the teacher-forced chain with FP16 activations, and FP16 weights or the INT8 linears of a plan.

    Args:
        checkpoint: The weights.
        reference: PyTorch FP32 on the same windows.
        residual_dtype: Of the residual stream and state, ``float16`` or ``float32``.
        tolerances: Those of ``fp16`` apply, with a plan those of ``w8a8``.
        progress: Told what runs.
        plan: The W8A8 plan that the graphs were made of; None runs plain FP16.

    Returns:
        The comparison, and notes on what was shortened.
    """
    kind = f"W8A8, {residual_dtype} residual" if plan else f"{residual_dtype} residual stream"
    progress(f"PyTorch FP16 ({kind}): {STEP}", 0, reference.windows.count)
    reference, notes = _affordable(reference, checkpoint.config.parameter_count)
    windows = reference.windows
    row = Comparison(
        target="pytorch-half",
        runtime="pytorch-half",
        graph=f"model ({kind})",
        precision="w8a8" if plan else "fp16",
        regime=STEP,
        steps=windows.length,
        arithmetic="int8-emulated+fp16" if plan else "fp16",
    )
    label = f"{STEP} ({kind})"
    scorer = Scorer(reference, STEP, 1, near_tie_margin=tolerances.near_tie_margin)
    try:
        model = model_from_checkpoint(checkpoint, torch.float16, _DTYPES[residual_dtype])
    except UnsupportedError as error:
        return compare(row, scorer.scores(), tolerances, [str(error)], label=label), notes
    model = emulate_fp16(model) if plan is None else emulate_w8a8(model, quantize_linears(reference.model, plan))
    half = Reference(model, windows, batch=windows.count)
    block = max(1, BLOCK_ELEMENTS // (windows.count * checkpoint.config.vocab_size))
    for first in range(0, windows.length, block):
        last = min(first + block, windows.length)
        scorer.add(slice(0, windows.count), first, half.logits(STEP, 1, slice(0, windows.count), slice(first, last)))
    return compare(row, scorer.scores(), tolerances, scorer.problems, label=label), notes


def _affordable(reference: Reference, parameters: int) -> tuple[Reference, list[str]]:
    windows = reference.windows
    if parameters <= _LARGE_MODEL or windows.count <= _WINDOWS_OF_LARGE_MODEL:
        return reference, []
    fewer = reference.first_windows(_WINDOWS_OF_LARGE_MODEL)
    note = (
        f"pytorch-half ran {fewer.windows.count} of {windows.count} windows: half-precision attention of a model of "
        f"{parameters:,} parameters is slow on a CPU"
    )
    return fewer, [note]
