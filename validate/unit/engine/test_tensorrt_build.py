"""TensorRT-RTX compiles for SM 8.0 on the CPU, for real: what it accepts, and what our builder refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from crt_export.engine.tensorrt import api
from crt_export.engine.tensorrt.api import load_api
from crt_export.engine.tensorrt.build import build_engine
from crt_export.engine.tensorrt.layers import is_int8_gemm
from crt_export.errors import BuildError, MissingDependencyError, UnsupportedError
from crt_export.machine import Gpu
from crt_export.profile import EngineProfile, load_profile

WIDTH = 64
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT

needs_rtx = pytest.mark.skipif(
    sys.platform != "linux" or subprocess.run(["uname", "-m"], capture_output=True).stdout.strip() != b"x86_64",
    reason="tensorrt-rtx has wheels for Linux x86_64 only",
)


def fp16() -> EngineProfile:
    return load_profile("rtx-sm80-fp16").with_capacity(32)


def int8() -> EngineProfile:
    return load_profile("rtx-sm80-int8").with_capacity(32)


class Network:
    """An ONNX file of a few linears, written by hand: each method adds one and returns its output's name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, dims: list[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, dims))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def linear(self, name: str, x: str, dtype: int) -> str:
        kind = np.float16 if dtype == HALF else np.float32
        weight = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(kind)
        product = self.node("MatMul", [x, self.constant(f"{name}.weight", weight)], f"{name}_product")
        return self.node("Add", [product, self.constant(f"{name}.bias", np.ones(WIDTH, kind))], name)

    def int8_linear(self, name: str, x: str, scales: int) -> str:
        """A W8A8 linear on an FP16 input whose scales are FP32 (casts around it) or FP16 (none)."""
        kind = np.float16 if scales == HALF else np.float32
        weight = np.random.default_rng(0).integers(-127, 128, (WIDTH, WIDTH), dtype=np.int8)
        zero, scale = (
            self.constant(f"{name}.zero", np.array(0, np.int8)),
            self.constant(f"{name}.x_scale", np.array(0.02, kind)),
        )
        w_scale = self.constant(f"{name}.w_scale", np.full(WIDTH, 0.01, kind))
        w_zero = self.constant(f"{name}.w_zero", np.zeros(WIDTH, np.int8))
        x = self.node("Cast", [x], f"{name}_wide", to=FLOAT) if scales == FLOAT else x
        x = self.node("QuantizeLinear", [x, scale, zero], f"{name}_quantized")
        x = self.node("DequantizeLinear", [x, scale, zero], f"{name}_x")
        stored = self.constant(f"{name}.weight", weight)
        weights = self.node("DequantizeLinear", [stored, w_scale, w_zero], f"{name}_w", axis=1)
        product = self.node("MatMul", [x, weights], f"{name}_product")
        total = self.node("Add", [product, self.constant(f"{name}.bias", np.ones(WIDTH, kind))], f"{name}_total")
        return self.node("Cast", [total], name, to=HALF)

    def write(self, path: Path, output: str, dtype: int, dims: tuple[int | str, ...] = ("batch", WIDTH)) -> Path:
        outputs = [helper.make_tensor_value_info(output, dtype, dims)]
        graph = helper.make_graph(self.nodes, "linears", self.inputs, outputs, self.weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10), path)
        return path


def chain(path: Path, dtype: int, add: Callable[[Network, str, str], str]) -> Path:
    """Two linears, a GELU between them."""
    network = Network()
    x = add(network, "up", network.input("x", dtype, ["batch", WIDTH]))
    x = add(network, "down", network.node("Gelu", [x], "active"))
    return network.write(path, x, dtype)


def compile_chain(path: Path, profile: EngineProfile) -> Any:
    return build_engine(path, profile, graph_name="step", unroll=1, linears=2)


@needs_rtx
def test_a_half_engine_carries_its_sidecar(tmp_path: Path) -> None:
    path = chain(tmp_path / "half.onnx", HALF, lambda n, name, x: n.linear(name, x, HALF))
    engine = compile_chain(path, fp16())
    assert len(engine.plan) > 1000
    assert sum(layer.is_gemm for layer in engine.layers) == 2
    sidecar = json.loads(json.dumps(engine.sidecar))
    expected = {
        "target": "rtx-sm80-fp16",
        "runtime": "tensorrt-rtx",
        "graph": "step",
        "compute_capability": 80,
        "precision": "fp16",
        "capacity": 32,
        "unroll": 1,
        "linears": 2,
        "inputs": [
            {
                "name": "x",
                "dtype": "float16",
                "dims": ["batch", WIDTH],
                "min": [1, WIDTH],
                "opt": [1, WIDTH],
                "max": [4, WIDTH],
            }
        ],
        "outputs": [{"name": "down", "dtype": "float16", "dims": ["batch", WIDTH]}],
        "aliases": [],
    }
    assert {key: sidecar[key] for key in expected} == expected
    assert sidecar["runtime_version"] == __import__("tensorrt_rtx").__version__
    assert sum(sidecar["layers"].values()) == len(engine.layers)


@needs_rtx
def test_float_scales_give_int8_gemms_with_float_outputs(tmp_path: Path) -> None:
    path = chain(tmp_path / "int8.onnx", HALF, lambda n, name, x: n.int8_linear(name, x, FLOAT))
    gemms = [layer for layer in compile_chain(path, int8()).layers if is_int8_gemm(layer)]
    assert [[tensor.dtype for tensor in layer.outputs] for layer in gemms] == [["float32"], ["float32"]]


@needs_rtx
def test_half_scales_are_refused_for_their_half_accumulators(tmp_path: Path) -> None:
    path = chain(tmp_path / "overflow.onnx", HALF, lambda n, name, x: n.int8_linear(name, x, HALF))
    with pytest.raises(BuildError, match="2 problems") as failure:
        compile_chain(path, int8())
    assert "INT8 GEMM with a Half output" in str(failure.value)
    assert "node_up_product" in str(failure.value)


@needs_rtx
def test_a_linear_left_in_half_is_refused_in_an_int8_engine(tmp_path: Path) -> None:
    def mixed(network: Network, name: str, x: str) -> str:
        return network.int8_linear(name, x, FLOAT) if name == "up" else network.linear(name, x, HALF)

    with pytest.raises(BuildError, match=r"linear node_down_product is computed by .* which is no INT8 GEMM"):
        compile_chain(chain(tmp_path / "mixed.onnx", HALF, mixed), int8())


@needs_rtx
def test_float_gemms_are_refused_in_a_half_engine(tmp_path: Path) -> None:
    path = chain(tmp_path / "float.onnx", FLOAT, lambda n, name, x: n.linear(name, x, FLOAT))
    with pytest.raises(BuildError, match="2 problems") as failure:
        compile_chain(path, fp16())
    assert str(failure.value).count("is an FP32 GEMM") == 2


@needs_rtx
def test_an_input_that_nothing_reads_fails_the_build(tmp_path: Path) -> None:
    network = Network()
    network.input("spare", HALF, ["batch", WIDTH])
    path = network.write(
        tmp_path / "spare.onnx", network.linear("up", network.input("x", HALF, ["batch", WIDTH]), HALF), HALF
    )
    with pytest.raises(BuildError, match="warning: Unused Input: spare"):
        build_engine(path, fp16(), graph_name="step", unroll=1, linears=1)


@needs_rtx
def test_what_the_parser_cannot_read_is_a_build_error(tmp_path: Path) -> None:
    network = Network()
    x = network.linear("up", network.input("x", HALF, ["batch", WIDTH]), HALF)
    path = network.write(tmp_path / "unknown.onnx", network.node("Bernoulli", [x], "y"), HALF)
    with pytest.raises(BuildError, match=r"(?s)parsing .*unknown\.onnx.*Bernoulli"):
        build_engine(path, fp16(), graph_name="step", unroll=1, linears=1)


def test_the_count_of_linears_is_checked_first(tmp_path: Path) -> None:
    path = chain(tmp_path / "half.onnx", HALF, lambda n, name, x: n.linear(name, x, HALF))
    with pytest.raises(BuildError, match="3 MatMuls by a weight expected, 2 found"):
        build_engine(path, fp16(), graph_name="step", unroll=1, linears=3)


def test_a_symbolic_dim_without_a_range_is_refused(tmp_path: Path) -> None:
    network = Network()
    x = network.input("x", HALF, ["beam", WIDTH])
    path = network.write(tmp_path / "open.onnx", network.linear("up", x, HALF), HALF)
    with pytest.raises(BuildError, match="beam must be a number for TensorRT"):
        build_engine(path, fp16(), graph_name="step", unroll=1, linears=1)


@pytest.mark.parametrize("capacity", ["capacity", 16])
def test_a_cache_of_another_capacity_is_refused(tmp_path: Path, capacity: str | int) -> None:
    network = Network()
    past = network.input("past", HALF, ["batch", 4, capacity, 16])
    update = network.input("update", HALF, ["batch", 4, 1, 16])
    network.node("TensorScatter", [past, update, network.input("position", TensorProto.INT64, ["batch"])], "present")
    path = network.write(tmp_path / "cache.onnx", "present", HALF, ("batch", 4, capacity, 16))
    with pytest.raises(
        BuildError, match=rf"caches for 32 tokens expected .*: past: float16 \[batch, 4, {capacity}, 16\]"
    ):
        build_engine(path, fp16(), graph_name="step", unroll=1, linears=0)


def test_products_need_names_of_their_own(tmp_path: Path) -> None:
    path = chain(tmp_path / "twins.onnx", HALF, lambda n, name, x: n.linear(name, x, HALF))
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = "same" if node.op_type == "MatMul" else node.name
    onnx.save(model, path)
    with pytest.raises(BuildError, match="matrix products need names of their own, 2 are called 'same'"):
        compile_chain(path, fp16())


def test_a_length_that_the_parser_would_drop_is_refused(tmp_path: Path) -> None:
    network = Network()
    inputs = [network.input(name, HALF, ["batch", 4, 8, 16]) for name in ("q", "k", "v")]
    length = network.input("length", TensorProto.INT64, ["batch"])
    network.node("Attention", [*inputs, "", "", "", length], "y")
    with pytest.raises(BuildError, match="drops nonpad_kv_seqlen silently"):
        build_engine(network.write(tmp_path / "a.onnx", "y", HALF), fp16(), graph_name="step", unroll=1, linears=0)


def test_a_file_that_is_no_onnx_is_a_build_error(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\x00not onnx")
    with pytest.raises(BuildError, match="cannot be read as ONNX"):
        compile_chain(tmp_path / "x.onnx", fp16())


@needs_rtx
def test_the_builder_prints_nothing_on_stdout(tmp_path: Path) -> None:
    """Attention with head_dim 70 makes the native builder print an error of its own."""
    network = Network()
    shape: list[int | str] = ["batch", 4, 8, 70]
    inputs = [network.input(name, HALF, shape) for name in ("q", "k", "v")]
    seen = network.input("seen", TensorProto.INT64, ["batch", 1, 8, 8])
    mask = network.node("Less", [seen, network.constant("one", np.array(1))], "mask")
    network.node("Attention", [*inputs, mask], "y", scale=0.1)
    path = network.write(tmp_path / "noisy.onnx", "y", HALF, ("batch", 4, 8, 70))
    code = f"""
from pathlib import Path
from crt_export.engine.tensorrt.build import build_engine
from crt_export.errors import BuildError
from crt_export.profile import load_profile
try:
    build_engine(Path({str(path)!r}), load_profile("rtx-sm80-fp16"), graph_name="step", unroll=1, linears=0)
except BuildError as error:
    print("refused:", str(error).splitlines()[0])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("refused: building rtx-sm80-fp16 step")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


def test_without_tensorrt_the_error_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError) as failure:
        load_api(load_profile("trt-sm80-fp16"))
    message = str(failure.value)
    assert failure.value.exit_code == 3
    for part in ("trt-sm80-fp16", "tensorrt 10.16 or newer", "crt-export[tensorrt]", "compute capability 8.0", "rtx-*"):
        assert part in message


def test_without_tensorrt_rtx_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match=r"crt-export\[rtx\]"):
        load_api(load_profile("rtx-sm80-fp16"))


@pytest.mark.parametrize(
    ("version", "capability", "complaint"),
    [
        ("10.15.1.29", 80, "found tensorrt 10.15.1.29"),
        ("10.16.1.11", None, "this machine has no usable NVIDIA GPU"),
        ("10.16.1.11", 75, "this machine's first GPU is Card, 7.5"),
        ("11.4.0.106", 90, None),
        ("10.16.1.11", 80, None),
    ],
)
def test_tensorrt_needs_its_version_and_its_gpu(
    monkeypatch: pytest.MonkeyPatch, version: str, capability: int | None, complaint: str | None
) -> None:
    module = types.ModuleType("tensorrt")
    module.__dict__["__version__"] = version
    gpus = () if capability is None else (Gpu(name="Card", compute_capability=capability),)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(api, "list_gpus", lambda: gpus)
    profile = load_profile("trt-sm80-fp16")
    if complaint is None:
        assert load_api(profile) is module
        return
    with pytest.raises(MissingDependencyError) as failure:
        load_api(profile)
    assert complaint in str(failure.value)


@needs_rtx
def test_an_architecture_that_rtx_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = fp16()
    object.__setattr__(profile, "compute_capability", 90)  # the profile itself would refuse it
    with pytest.raises(UnsupportedError, match=r"compiles for SM75, SM80, .* not SM90"):
        load_api(profile)
