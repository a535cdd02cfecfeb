"""ONNX Runtime: what is checked before a run, bound memory, and what a missing or doubled installation says."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from crt_export.engine.base import Buffer, BufferSlice
from crt_export.engine.onnxruntime import DeviceBuffer, OrtEngine, OrtGraph, load_graph
from crt_export.engine.ort import OrtSettings, import_onnxruntime
from crt_export.errors import ContractError, InputError, MissingDependencyError, UnsupportedError

HEADS, WIDTH = 2, 4


def write_cache_graph(path: Path, dtype: int = TensorProto.FLOAT) -> Path:
    """A cache update beside a doubled state: the two kinds of memory a session binds."""

    def tensor(name: str, kind: int, *dims: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, dims)

    nodes = [
        helper.make_node("TensorScatter", ["past", "update", "position"], ["present"], axis=-2, mode="linear"),
        helper.make_node("Add", ["state", "state"], ["next_state"]),
    ]
    graph = helper.make_graph(
        nodes,
        "cache",
        [
            tensor("past", dtype, "batch", HEADS, "capacity", WIDTH),
            tensor("update", dtype, "batch", HEADS, "seq", WIDTH),
            tensor("position", TensorProto.INT64, "batch"),
            tensor("state", TensorProto.FLOAT, "batch", 1, WIDTH),
        ],
        [
            tensor("present", dtype, "batch", HEADS, "capacity", WIDTH),
            tensor("next_state", TensorProto.FLOAT, "batch", 1, WIDTH),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.save(model, path)
    return path


def arrays(batch: int = 2, capacity: int = 6, seq: int = 1, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {
        "past": np.zeros((batch, HEADS, capacity, WIDTH), dtype),
        "update": np.ones((batch, HEADS, seq, WIDTH), dtype),
        "position": np.arange(batch, dtype=np.int64),
        "state": np.ones((batch, 1, WIDTH), np.float32),
    }


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> OrtGraph:
    return load_graph(write_cache_graph(tmp_path_factory.mktemp("ort") / "cache.onnx"), threads=1)


def test_a_loaded_graph_describes_itself(graph: OrtGraph) -> None:
    assert [str(spec) for spec in graph.inputs] == [
        "past: float32 [batch, 2, capacity, 4]",
        "update: float32 [batch, 2, seq, 4]",
        "position: int64 [batch]",
        "state: float32 [batch, 1, 4]",
    ]
    assert [spec.name for spec in graph.outputs] == ["present", "next_state"]


def test_a_run_gives_every_output_by_name(graph: OrtGraph) -> None:
    found = graph.run(arrays())
    assert list(found) == ["present", "next_state"]
    assert found["present"][1, 0, 1].tolist() == [1, 1, 1, 1]
    assert found["present"].sum() == 2 * HEADS * WIDTH


Edit = Callable[[dict[str, np.ndarray]], Any]
WRONG: list[tuple[str, Edit, str]] = [
    ("missing", lambda a: a.pop("state"), "state is missing"),
    ("extra", lambda a: a.update(extra=np.zeros(1)), "extra is not part of the graph"),
    ("dtype", lambda a: a.update(position=a["position"].astype(np.int32)), "position must be int64, found int32"),
    ("rank", lambda a: a.update(state=a["state"][0]), r"state must have dims .*found shape \[1, 4\]"),
    ("size", lambda a: a.update(state=np.ones((2, 1, 5), np.float32)), r"state has 5 on axis 2 \(4\), the graph has 4"),
    ("batch", lambda a: a.update(position=np.zeros(3, np.int64)), r"position has 3 on axis 0 \(batch\), past has 2"),
    ("all", lambda a: (a.pop("state"), a.update(position=np.zeros(2))), "2 problems"),
]


@pytest.mark.parametrize(("edit", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_inputs_are_checked_before_the_run(graph: OrtGraph, edit: Edit, message: str) -> None:
    inputs = arrays()
    edit(inputs)
    with pytest.raises(ContractError, match=message):
        graph.run(inputs)


def test_a_failing_run_is_one_clear_error_and_prints_nothing(
    graph: OrtGraph, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs = arrays()
    inputs["position"][1] = 6
    with pytest.raises(ContractError, match=r"failed in cache\.onnx: .*exceeds max_sequence_length"):
        graph.run(inputs)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("memory", ["host", "device"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bound_rows_are_updated_in_place_and_no_other(tmp_path: Path, dtype: str, memory: str) -> None:
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]
    path = write_cache_graph(tmp_path / "cache.onnx", kind)
    engine = OrtEngine({"step": path}, OrtSettings(threads=1), max_tokens=8)

    def allocate(shape: tuple[int, ...], dtype: str) -> Buffer:
        if memory == "host":
            return engine.allocate(shape, dtype)
        # The memory of a GPU session, on the one device that every machine has.
        return DeviceBuffer(import_onnxruntime(), "cpu", shape, dtype)

    cache = allocate((4, HEADS, 6, WIDTH), dtype)
    update = allocate((2, HEADS, 1, WIDTH), dtype)
    position = allocate((4,), "int64")
    states = [allocate((4, 1, WIDTH), "float32") for _ in range(2)]
    update.write(np.ones((2, HEADS, 1, WIDTH)))
    position.write(np.array([0, 5, 2, 0]))
    states[0].write(np.full((4, 1, WIDTH), 3))
    launch = engine.program("step").bind(
        {
            "past": BufferSlice(cache, 1, 3),
            "update": BufferSlice(update, 0, 2),
            "position": BufferSlice(position, 1, 3),
            "state": BufferSlice(states[0], 1, 3),
        },
        {"present": BufferSlice(cache, 1, 3), "next_state": BufferSlice(states[1], 1, 3)},
    )
    launch()
    written = {(int(row), int(slot)) for row, _, slot, _ in np.argwhere(cache.read())}
    assert written == {(1, 5), (2, 2)}
    assert states[1].read()[:, 0, 0].tolist() == [0, 6, 6, 0]
    assert states[0].read()[:, 0, 0].tolist() == [3, 3, 3, 3]
    position.write(np.array([0, 0, 1, 0]))  # the launch sees what its buffers hold when it runs
    launch()
    assert cache.read()[1, :, 0].any()
    states[0].copy_rows(states[1], slice(2, 4))
    assert states[0].read()[:, 0, 0].tolist() == [3, 3, 6, 0]
    cache.clear(1, 0, 5)
    assert {(int(row), int(slot)) for row, _, slot, _ in np.argwhere(cache.read())} == {(1, 5), (2, 1), (2, 2)}


def test_int8_products_are_exact_on_every_cpu(tmp_path: Path) -> None:
    """Without VNNI, sums of two products of uint8 and int8 saturate: hence the largest values."""
    rows, inner, columns = 3, 64, 5
    weight = np.full((inner, columns), 127, np.int8)
    weight[::3] = -127
    unit = {"unit": np.float32(1), "zero": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "unit", "zero"], ["x_int8"]),
        helper.make_node("DequantizeLinear", ["x_int8", "unit", "zero"], ["x_back"]),
        helper.make_node("DequantizeLinear", ["weight", "unit", "zero"], ["weight_back"]),
        helper.make_node("MatMul", ["x_back", "weight_back"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "w8a8",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (rows, inner))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (rows, columns))],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in {**unit, "weight": weight}.items()],
    )
    path = tmp_path / "w8a8.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10), path)
    x = np.where(np.arange(rows * inner).reshape(rows, inner) % 2, 127, 126).astype(np.float32)
    assert np.array_equal(load_graph(path, threads=1).run({"x": x})["y"], x @ weight.astype(np.float32))


def test_an_engine_names_the_graphs_it_has(tmp_path: Path) -> None:
    engine = OrtEngine({"step": write_cache_graph(tmp_path / "a.onnx")}, OrtSettings(threads=1), max_tokens=8)
    with pytest.raises(UnsupportedError, match="no prefill graph, only step"):
        engine.program("prefill")


def test_files_that_are_no_graph_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ContractError, match="expected an ONNX file, found nothing"):
        load_graph(tmp_path / "absent.onnx")
    with pytest.raises(ContractError, match="found a folder"):
        load_graph(tmp_path)
    (tmp_path / "noise.onnx").write_bytes(b"\x00\xff not a graph")
    with pytest.raises(ContractError, match=r"noise\.onnx: ONNX Runtime cannot load it"):
        load_graph(tmp_path / "noise.onnx")
    assert capfd.readouterr() == ("", "")


def test_tensors_outside_the_contracts_dtypes_are_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", ["a"], ["b"])]
    sides = ([value("a", TensorProto.DOUBLE, [1])], [value("b", TensorProto.DOUBLE, [1])])
    graph = helper.make_graph(nodes, "doubles", *sides)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10),
        tmp_path / "doubles.onnx",
    )
    with pytest.raises(ContractError, match=r"a is tensor\(double\)"):
        load_graph(tmp_path / "doubles.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": -1}, "threads"),
        ({"threads": 1.5}, "threads"),
        ({"device": "tpu", "threads": -1}, "2 problems"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OrtSettings(**options)


def test_both_wheels_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        info = tmp_path / f"{name}-1.31.1.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.31.1\n"
        (info / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(MissingDependencyError, match=r"overwrite each other's files: pip uninstall") as caught:
        import_onnxruntime()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_missing_runtime_names_the_extra(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'crt-export\[{device}\]'"):
        import_onnxruntime(device)


def test_a_runtime_that_cannot_be_loaded_is_not_called_absent(tmp_path: Path) -> None:
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')\n")
    program = "from crt_export.engine.ort import import_onnxruntime; import_onnxruntime()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, check=False)
    words = rb"onnxruntime.*, which is installed, cannot be loaded \(libgomp.so.1: cannot open shared object file\)"
    assert re.search(words, result.stderr), result.stderr
    assert b"pip install" not in result.stderr


def test_a_cpu_build_cannot_serve_a_gpu_target() -> None:
    library = import_onnxruntime()
    if "CUDAExecutionProvider" in library.get_available_providers():
        pytest.skip("the installed ONNX Runtime is the GPU build")
    with pytest.raises(MissingDependencyError, match=r"no CUDAExecutionProvider.*crt-export\[cuda\]"):
        load_graph("any.onnx", device="cuda")
