"""TensorRT-RTX compiles the published size whose heads have no fused attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crt_export.checkpoint import load_checkpoint
from crt_export.engine.tensorrt.build import CompiledEngine
from crt_export.graph.export import GraphExporter
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.profile import load_profile
from crt_export.quantize.calibration import CalibrationOptions, calibrate
from crt_export.quantize.plan import QuantizedLinears, plan_w8a8, quantize_linears
from crt_export.quantize.w8a8 import quantize_w8a8

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (Linux x86_64 only)")

UNROLL = 2


# Small models compile in make test, decomposed attention and INT8 among them; only the size is this test's own.
@pytest.mark.evidence
@pytest.mark.slow
def test_the_published_size_with_70_wide_heads(
    make_checkpoint: Callable[..., Path],
    compile_graph: Callable[..., CompiledEngine],
    heldout_text: Path,
    tmp_path: Path,
) -> None:
    """D=5, C=1120, 16 heads: no fused kernel, so attention is decomposed. Random weights, small vocabulary."""
    folder = make_checkpoint(
        hidden_size=1120,
        num_hidden_layers=5,
        num_attention_heads=16,
        intermediate_size=4480,
        correction_intermediate_size=4480,
        vocab_size=256,
        unroll_steps=UNROLL,
    )
    checkpoint = load_checkpoint(folder)
    config: Any = checkpoint.config
    assert config.head_dim == 70
    linears = _linears(model_from_checkpoint(checkpoint), heldout_text)
    exporter = GraphExporter(model_from_checkpoint(checkpoint, torch.float16))
    fp16, int8 = (load_profile(name).with_capacity(64) for name in ("rtx-sm80-fp16", "rtx-sm80-int8"))
    step, prefill = exporter.graph("step"), exporter.graph("prefill", unroll=UNROLL)
    quantized = step.clone()
    quantize_w8a8(quantized, linears)
    # Per layer: query, key and value in one GEMM, output, up, down; the correction's two; the head once.
    for graph, profile, kind, gemms in (
        (step, fp16, "float16 -> float16", 23),
        (quantized, int8, "int8 -> float32", 23),
        (prefill, fp16, "float16 -> float16", 22 * UNROLL + 1),
    ):
        engine = compile_graph(graph, config, profile, tmp_path)
        assert engine.sidecar["layers"][f"gemm {kind}"] == gemms


def _linears(model: LanguageModel, text: Path) -> QuantizedLinears:
    """Little real text, enough for scales that are real; how well they fit is no matter of compiling."""
    ids = np.frombuffer(text.read_bytes()[:512], np.uint8).astype(np.int64).reshape(16, 32)
    statistics = calibrate(model, ids, unroll=UNROLL, options=CalibrationOptions(minimum_tokens=512))
    return quantize_linears(model, plan_w8a8(model, statistics))
