"""TensorRT-RTX compiles the exported graphs of real architectures for SM 8.0, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from crt_export.checkpoint import load_checkpoint
from crt_export.engine.tensorrt.build import CompiledEngine, build_engine
from crt_export.engine.tensorrt.layers import is_int8_gemm
from crt_export.errors import BuildError
from crt_export.graph.export import GraphExporter
from crt_export.graph.passes.fix_capacity import fix_capacity
from crt_export.models.registry import model_from_checkpoint
from crt_export.profile import load_profile
from crt_export.quantize.calibration import calibrate, calibration_windows
from crt_export.quantize.linears import expected_matmuls
from crt_export.quantize.plan import plan_w8a8, quantize_linears
from crt_export.quantize.w8a8 import quantize_w8a8

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (Linux x86_64 only)")

UNROLL = 2
# Four heads of 16: the smallest size with a fused attention kernel. Two layers: what the builder's cycle needs.
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "unroll_steps": UNROLL}
Compile = Callable[..., CompiledEngine]


@pytest.fixture(scope="module")
def small(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(**SMALL)


@pytest.fixture(scope="module")
def graphs(small: Path, shared_traces: None) -> dict[str, ir.Model]:
    exporter = GraphExporter(model_from_checkpoint(load_checkpoint(small), torch.float16))
    return {name: exporter.graph(name, unroll=UNROLL if name == "prefill" else 1) for name in ("step", "prefill")}


def test_fp16_step_and_prefill(
    small: Path, graphs: dict[str, ir.Model], compile_graph: Compile, tmp_path: Path
) -> None:
    model = model_from_checkpoint(load_checkpoint(small))
    profile = load_profile("rtx-sm80-fp16").with_capacity(32)
    for name, attentions in (("step", 2), ("prefill", 2 * UNROLL)):
        engine = compile_graph(graphs[name].clone(), model.config, profile, tmp_path)
        assert engine.sidecar["layers"]["attention float16 -> float16"] == attentions
        assert engine.sidecar["aliases"] == [
            [f"present_key_values.{i}.{side}", f"past_key_values.{i}.{side}"]
            for i in (0, 1)
            for side in ("key", "value")
        ]
        assert all("Int64 binding" in warning for warning in engine.warnings)
        seq = {entry["name"]: (entry["min"], entry["max"]) for entry in engine.sidecar["inputs"]}["input_ids"]
        assert seq == (([1, 1], [4, 1]) if name == "step" else ([1, 1], [4, 32]))


def test_int8_step_and_prefill(
    small: Path, graphs: dict[str, ir.Model], train_text: Path, compile_graph: Compile, tmp_path: Path
) -> None:
    model = model_from_checkpoint(load_checkpoint(small))
    tokens = np.frombuffer(train_text.read_bytes(), np.uint8).astype(np.int64)
    plan = plan_w8a8(model, calibrate(model, calibration_windows(tokens, seq=32), unroll=UNROLL))
    linears = quantize_linears(model, plan)
    profile = load_profile("rtx-sm80-int8").with_capacity(32)
    for name in ("step", "prefill"):
        graph = graphs[name].clone()
        count = quantize_w8a8(graph, linears)
        engine = compile_graph(graph, model.config, profile, tmp_path)
        assert engine.sidecar["linears"] == count
        gemms = [layer for layer in engine.layers if is_int8_gemm(layer)]
        # One GEMM serves query, key and value, so there are two fewer per layer and pass than linears.
        passes = UNROLL if name == "prefill" else 1
        assert len(gemms) == count - 2 * 2 * passes
        assert {tensor.dtype for layer in gemms for tensor in layer.outputs} == {"float32"}


def test_the_builder_still_needs_a_rotation_of_the_last_pass_own(
    graphs: dict[str, ir.Model], small: Path, write_alone: Callable[[ir.Model, Path], Path], tmp_path: Path
) -> None:
    """Without the pass separate_rotation it crashes; its death is an error here, not the end of the process."""
    graph = graphs["prefill"].clone()
    profile = load_profile("rtx-sm80-fp16").with_capacity(32)
    fix_capacity(graph, profile.capacity)
    linears = expected_matmuls(load_checkpoint(small).config, "prefill", UNROLL)
    with pytest.raises(BuildError, match=r"(died with signal|uses before defs)"):
        build_engine(write_alone(graph, tmp_path), profile, graph_name="prefill", unroll=UNROLL, linears=linears)
