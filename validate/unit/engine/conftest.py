"""Compile exported graphs as the pipeline does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from crt_export.config import ModelConfig
from crt_export.engine.tensorrt.build import CompiledEngine, build_engine
from crt_export.graph.passes.decompose_attention import attention_of_profile, decompose_attention
from crt_export.graph.passes.fix_capacity import fix_capacity
from crt_export.graph.passes.separate_rotation import separate_rotation
from crt_export.graph.weights import write_graph, write_weights
from crt_export.profile import EngineProfile
from crt_export.quantize.linears import expected_matmuls


def _write_alone(graph: ir.Model, folder: Path) -> Path:
    path = folder / f"{graph.graph.name}.onnx"
    write_graph(graph, path, write_weights({path.name: graph}, folder / f"{path.stem}.weights"))
    return path


def _compile_graph(graph: ir.Model, config: ModelConfig, profile: EngineProfile, folder: Path) -> CompiledEngine:
    name = str(graph.graph.name)
    unroll = config.carried.passes if name == "prefill" else 1
    fix_capacity(graph, profile.capacity)
    separate_rotation(graph)
    if attention_of_profile(profile, config.carried) == "decomposed":
        decompose_attention(graph)
    linears = expected_matmuls(config, name, unroll)
    return build_engine(_write_alone(graph, folder), profile, graph_name=name, unroll=unroll, linears=linears)


@pytest.fixture(scope="session")
def write_alone() -> Callable[[ir.Model, Path], Path]:
    """``write_alone(graph, folder) -> path``: an ONNX file with a weight file of its own."""
    return _write_alone


@pytest.fixture(scope="session")
def compile_graph() -> Callable[[ir.Model, ModelConfig, EngineProfile, Path], CompiledEngine]:
    """``compile_graph(graph, config, profile, folder)``: give a graph the target's form, in place, and compile it."""
    return _compile_graph
