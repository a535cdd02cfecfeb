"""TensorRT-RTX compiles the published size whose heads have no fused attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crt_export.checkpoint import load_checkpoint
from crt_export.engine.tensorrt import CompiledEngine
from crt_export.graph import GraphExporter
from crt_export.model import model_from_checkpoint
from crt_export.profile import load_profile

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (Linux x86_64 only)")

UNROLL = 2


@pytest.mark.slow
def test_the_published_size_with_70_wide_heads(
    make_checkpoint: Callable[..., Path], compile_graph: Callable[..., CompiledEngine], tmp_path: Path
) -> None:
    """D=5, C=1120, 16 heads: no fused kernel, so attention is decomposed. Random weights, small vocabulary."""
    checkpoint = make_checkpoint(
        hidden_size=1120,
        num_hidden_layers=5,
        num_attention_heads=16,
        intermediate_size=4480,
        correction_intermediate_size=4480,
        vocab_size=256,
        unroll_steps=UNROLL,
    )
    model = model_from_checkpoint(load_checkpoint(checkpoint), torch.float16)
    assert model.config.head_dim == 70
    exporter = GraphExporter(model)
    profile = load_profile("rtx-sm80-fp16").with_capacity(64)
    # Per layer: query, key and value in one GEMM, output, up, down; the correction's two; the head once.
    for name, gemms in (("step", 23), ("prefill", 22 * UNROLL + 1)):
        graph = exporter.graph(name, unroll=UNROLL if name == "prefill" else 1)
        engine = compile_graph(graph, model.config, profile, tmp_path)
        assert engine.sidecar["layers"]["gemm float16 -> float16"] == gemms
