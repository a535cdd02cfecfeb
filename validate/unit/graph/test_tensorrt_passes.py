"""The passes that give a graph its TensorRT form: they change the form and not the function."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from crt_export.checkpoint import load_checkpoint
from crt_export.config import ModelConfig
from crt_export.engine.ort import import_onnxruntime
from crt_export.errors import BuildError, UnsupportedError
from crt_export.graph.contract import check_contract
from crt_export.graph.export import GraphExporter
from crt_export.graph.passes.decompose_attention import attention_of_profile, decompose_attention
from crt_export.graph.passes.fix_capacity import fix_capacity
from crt_export.graph.passes.separate_rotation import separate_rotation
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.profile import load_profile
from crt_export.spec import graph_spec

CAPACITY, SEQ, UNROLL, LAYERS = 12, 5, 3, 2


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> LanguageModel:
    return model_from_checkpoint(load_checkpoint(make_checkpoint(hidden_size=16, intermediate_size=32)))


@pytest.fixture(scope="module")
def exported(model: LanguageModel, shared_traces: None) -> dict[str, ir.Model]:
    exporter = GraphExporter(model)
    return {name: exporter.graph(name, unroll=UNROLL) for name in ("step", "prefill", "head")}


@pytest.fixture
def graph(exported: dict[str, ir.Model]) -> Callable[[str], ir.Model]:
    """``graph(name)``: a fresh copy."""
    return lambda name: exported[name].clone()


def inputs_of(graph: ir.Model) -> dict[str, np.ndarray]:
    """Two rows in the middle of a text: caches, state and first iterate are not zero."""
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "seq": SEQ, "capacity": CAPACITY}
    special = {"position": np.array([3, 7]), "length": np.array([5, 2])}
    values = {}
    for value in graph.graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        shape = [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape]
        random = rng.integers(0, 255, shape) if value.dtype == ir.DataType.INT64 else rng.normal(size=shape)
        values[value.name] = special.get(
            value.name, random.astype(np.int64 if random.dtype.kind == "i" else np.float32)
        )
    return values


def run(graph: ir.Model) -> dict[str, np.ndarray]:
    session = import_onnxruntime().InferenceSession(
        ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    return {name: np.asarray(value) for name, value in zip(names, session.run(names, inputs_of(graph)), strict=True)}


def operators(graph: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph.all_nodes())


def test_fixed_capacity_is_in_every_dim(graph: Callable[[str], ir.Model], model: LanguageModel) -> None:
    for name in ("step", "prefill"):
        fixed = graph(name)
        fix_capacity(fixed, CAPACITY)
        check_contract(fixed, graph_spec(name, model.config, "float32", CAPACITY))
        assert "capacity" not in str(ir.to_proto(fixed).graph)
        before, after = run(graph(name)), run(fixed)
        assert all(np.array_equal(before[key], after[key]) for key in before)


def test_fixing_the_capacity_needs_one(graph: Callable[[str], ir.Model]) -> None:
    with pytest.raises(BuildError, match="no input has the dim capacity"):
        fix_capacity(graph("head"), CAPACITY)
    with pytest.raises(BuildError, match="capacity must be at least 1 token, not 0"):
        fix_capacity(graph("step"), 0)
    fixed = graph("step")
    fix_capacity(fixed, CAPACITY)
    with pytest.raises(BuildError, match="no input has the dim capacity"):
        fix_capacity(fixed, CAPACITY + 1)


def test_decomposed_attention_computes_the_same(graph: Callable[[str], ir.Model]) -> None:
    for name, nodes in (("step", LAYERS), ("prefill", LAYERS * UNROLL)):
        decomposed = graph(name)
        assert decompose_attention(decomposed) == nodes
        found, original = operators(decomposed), operators(graph(name))
        assert (found["Attention"], found["Softmax"]) == (0, nodes)
        assert found["MatMul"] == original["MatMul"] + 2 * nodes
        before, after = run(graph(name)), run(decomposed)
        for key in before:
            np.testing.assert_allclose(after[key], before[key], atol=2e-5, rtol=0, err_msg=key)


def test_decomposed_half_attention_stays_finite_under_the_mask() -> None:
    """Scores near the end of FP16 on both sides of a mask, and a query that may attend to nothing."""
    names = ("q", "k", "v")
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 1, 2, 4]) for name in names]
    inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, [1, 1, 2, 2]))
    node = helper.make_node("Attention", [*names, "mask"], ["y"], name="attention", scale=1.0)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 1, 2, 4])
    proto = helper.make_graph([node], "half", inputs, [output])
    opset = [helper.make_opsetid("", 24)]
    graph = ir.from_proto(helper.make_model(proto, opset_imports=opset, ir_version=10))
    assert decompose_attention(graph) == 1
    values = {name: np.full((1, 1, 2, 4), 100, np.float16) for name in names}
    values["k"][0, 0, 0] = -100  # the score of the allowed key is -40000, of the masked one +40000
    values["v"][0, 0, 1] = 7
    values["mask"] = np.array([[[[True, False], [False, False]]]])
    session = import_onnxruntime().InferenceSession(
        ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = (np.asarray(value) for value in session.run(None, values))
    assert y.dtype == np.float16
    assert y[0, 0, :, 0].tolist() == [100, 53.5]  # the allowed value; the mean of both where nothing is allowed


def attention_of(graph: ir.Model) -> ir.Node:
    return next(node for node in graph.graph if node.op_type == "Attention")


def test_attention_of_another_form_is_refused_and_left_alone(graph: Callable[[str], ir.Model]) -> None:
    def without_scale(node: ir.Node) -> None:
        del node.attributes["scale"]

    def causal(node: ir.Node) -> None:
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)

    def without_mask(node: ir.Node) -> None:
        node.replace_input_with(3, None)

    for edit, complaint in (
        (without_scale, "no explicit scale"),
        (causal, "is_causal = 1 is not supported"),
        (without_mask, "3 inputs and 1 outputs"),
    ):
        edited = graph("step")
        edit(attention_of(edited))
        with pytest.raises(BuildError, match=complaint):
            decompose_attention(edited)
        assert operators(edited)["Attention"] == LAYERS


def test_the_last_pass_gets_a_look_up_of_its_own(graph: Callable[[str], ir.Model]) -> None:
    separated, original = graph("prefill"), graph("prefill")
    moved = separate_rotation(separated)
    assert moved == 4 * LAYERS  # cos and sin, for queries and keys of every layer
    assert operators(separated)["Gather"] == operators(original)["Gather"] + 2
    assert operators(separated)["Min"] == 1
    before, after = run(original), run(separated)
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_one_pass_needs_no_look_up_of_its_own(graph: Callable[[str], ir.Model]) -> None:
    step = graph("step")
    before = operators(step)
    assert separate_rotation(step) == 0
    assert operators(step) == before


def test_separating_a_rotation_needs_its_look_up(graph: Callable[[str], ir.Model]) -> None:
    assert separate_rotation(graph("head")) == 0, "nothing is rotated there"
    step = graph("step")
    for node in step.graph:
        if node.op_type == "Gather" and str(node.inputs[0].name).startswith("rope_"):  # type: ignore[union-attr]
            node.op_type = "GatherND"
    with pytest.raises(BuildError, match="no Gather from a rotary table"):
        separate_rotation(step)


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, "decomposed"),  # head_dim 8
        ({"hidden_size": 64}, "fused"),
        ({"hidden_size": 128, "num_attention_heads": 8}, "fused"),
        ({"hidden_size": 280}, "decomposed"),  # head_dim 70
        ({"hidden_size": 128, "num_attention_heads": 2}, "decomposed"),
        ({"hidden_size": 1024}, "fused"),  # head_dim 256
        ({"hidden_size": 2048}, "decomposed"),  # head_dim 512
    ],
)
def test_auto_takes_the_fused_form_where_there_is_a_kernel(
    tiny_config: Callable[..., ModelConfig], changes: dict[str, int], form: str
) -> None:
    carried = tiny_config(**changes).carried
    profile = load_profile("rtx-sm80-fp16")
    assert attention_of_profile(profile, carried) == form
    assert attention_of_profile(load_profile("rtx-sm80-int8"), carried) == form
    assert attention_of_profile(load_profile("ort-cpu-fp32"), carried) == "fused"
    assert attention_of_profile(dataclasses.replace(profile, attention="decomposed"), carried) == "decomposed"
    insisting = dataclasses.replace(profile, attention="fused")
    if form == "fused":
        assert attention_of_profile(insisting, carried) == "fused"
        return
    with pytest.raises(UnsupportedError, match='no kernel for attention = "fused"'):
        attention_of_profile(insisting, carried)
