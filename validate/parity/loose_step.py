"""A step graph that a test made without a bundle, compared with PyTorch over windows of text as in a build."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from loose_runner import loose_runner

from crt_export.parity import Comparison, ParityCase, load_tolerances
from crt_export.parity.comparison import compare
from crt_export.parity.reference import STEP, Reference
from crt_export.parity.rollout import Rollout
from crt_export.parity.scores import Scorer
from crt_export.quantize.plan import W8A8Plan

#: What a model is exported in, by precision.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "w8": torch.float32, "w8a8": torch.float16}


def compare_step(
    graph: ir.Model, precision: str, reference: Reference, folder: Path, *, unroll: int, plan: W8A8Plan | None = None
) -> Comparison:
    """Run the chain of a step graph over every window of the reference.

    Args:
        graph: The step, quantised for its precision.
        precision: ``fp32``, ``fp16``, ``w8`` or ``w8a8``.
        reference: What it is compared with.
        folder: Where the file is written.
        unroll: Passes K of its target.
        plan: That of w8a8.
    """
    ir.save(graph, folder / "step.onnx")
    windows, limits, graphs = reference.windows, load_tolerances(), {STEP: folder / "step.onnx"}
    runner = loose_runner(graphs, reference.model.config, precision, unroll=unroll)
    case = ParityCase(
        target="loose", runtime="onnxruntime", precision=precision, graphs=graphs, unroll=unroll,
        cache_dtype=str(DTYPES[precision]).removeprefix("torch."), plan=plan,
    )  # fmt: skip
    scorer = Scorer(reference, STEP, unroll, near_tie_margin=limits.near_tie_margin)
    Rollout(runner, case, windows, window_batch=windows.count).run(STEP, scorer, lambda done: None)
    row = Comparison(target="loose", runtime="onnxruntime", graph=STEP, precision=precision, regime=STEP)
    return compare(row, scorer.scores(), limits, scorer.problems)
