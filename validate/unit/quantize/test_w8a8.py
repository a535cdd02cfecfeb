from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch

from crt_export.checkpoint import Checkpoint
from crt_export.errors import BuildError, InputError
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.quantize.calibration import ActivationStatistics
from crt_export.quantize.emulation import emulate_w8a8
from crt_export.quantize.linears import expected_matmuls, linear_inputs, linear_names
from crt_export.quantize.plan import QuantizedLinears, plan_w8a8, quantize_linears
from crt_export.quantize.w8a8 import quantize_w8a8

Exported = Callable[[str, torch.dtype], ir.Model]
GRAPHS = ("step", "prefill", "head")


@pytest.fixture(scope="module")
def linears(small: Checkpoint, calibrated: Callable[[LanguageModel], ActivationStatistics]) -> QuantizedLinears:
    model = model_from_checkpoint(small)
    return quantize_linears(model, plan_w8a8(model, calibrated(model)))


@pytest.fixture(scope="module")
def quantized(exported: Exported, linears: QuantizedLinears) -> dict[str, tuple[ir.Model, int]]:
    graphs = {name: exported(name, torch.float16) for name in GRAPHS}
    return {name: (graph, quantize_w8a8(graph, linears)) for name, graph in graphs.items()}


def _nodes(graph: ir.Model, operator: str) -> list[ir.Node]:
    return [node for node in graph.graph if node.op_type == operator]


@pytest.mark.parametrize("name", GRAPHS)
def test_every_linear_is_quantised_once_per_pass(
    name: str, quantized: dict[str, tuple[ir.Model, int]], small: Checkpoint
) -> None:
    graph, count = quantized[name]
    assert count == expected_matmuls(small.config, name, 2) == len(_nodes(graph, "MatMul"))
    assert not any(f"{linear}.weight" in graph.graph.initializers for linear in linear_names(small.config))
    inputs = (len(linear_inputs(small.config)) - 1) * (2 if name == "prefill" else 1) + 1
    assert len(_nodes(graph, "QuantizeLinear")) == (1 if name == "head" else inputs), "q, k and v share one"


@pytest.mark.parametrize("name", GRAPHS)
def test_products_are_int8_with_fp32_scales_and_nothing_else_is(
    name: str, quantized: dict[str, tuple[ir.Model, int]]
) -> None:
    graph, _ = quantized[name]
    for node in _nodes(graph, "QuantizeLinear"):
        assert [user.op_type for user, _ in node.outputs[0].uses()] == ["DequantizeLinear"]
        assert node.inputs[1].dtype == ir.DataType.FLOAT  # type: ignore[union-attr]
        assert node.inputs[2].const_value.numpy() == 0  # type: ignore[union-attr]
    for node in _nodes(graph, "DequantizeLinear"):
        assert {user.op_type for user, _ in node.outputs[0].uses()} == {"MatMul"}
        assert node.inputs[1].dtype == node.outputs[0].dtype == ir.DataType.FLOAT  # type: ignore[union-attr]
    for node in _nodes(graph, "MatMul"):
        assert all(value.producer().op_type == "DequantizeLinear" for value in node.inputs)  # type: ignore[union-attr]
        assert node.outputs[0].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("name", GRAPHS)
def test_everything_between_the_linears_keeps_its_nodes_and_dtypes(
    name: str, quantized: dict[str, tuple[ir.Model, int]], exported: Exported
) -> None:
    ours = {"Cast", "QuantizeLinear", "DequantizeLinear", "MatMul", "Sub"}

    def has_bias(node: ir.Node) -> bool:
        return any(".bias" in (value.name or "") for value in node.inputs if value is not None)

    def untouched(graph: ir.Model) -> list[tuple[object, ...]]:
        return [
            (node.op_type, node.name, [value.dtype for value in (*node.inputs, *node.outputs) if value is not None])
            for node in graph.graph
            if node.op_type not in ours and not (node.op_type == "Add" and has_bias(node))
        ]

    before, after = exported(name, torch.float16), quantized[name][0]
    assert untouched(after) == untouched(before)
    for side in ("inputs", "outputs"):
        contract = [[(v.name, v.dtype, str(v.shape)) for v in getattr(g.graph, side)] for g in (before, after)]
        assert contract[0] == contract[1]


def test_weights_are_the_same_by_name_in_every_graph(quantized: dict[str, tuple[ir.Model, int]]) -> None:
    step = quantized["step"][0].graph.initializers
    for name in GRAPHS[1:]:
        other = quantized[name][0].graph.initializers
        shared = [key for key in other if "." in key]
        assert shared
        for key in shared:
            assert step[key].const_value.tobytes() == other[key].const_value.tobytes()  # type: ignore[union-attr]


def test_the_step_chain_is_the_emulated_half_precision_model(
    quantized: dict[str, tuple[ir.Model, int]],
    small: Checkpoint,
    linears: QuantizedLinears,
    step_chain: Callable[..., np.ndarray],
    text_tokens: np.ndarray,
) -> None:
    exact, half = model_from_checkpoint(small), model_from_checkpoint(small, torch.float16)
    ids = text_tokens[: 4 * 24].reshape(4, 24)
    reference = exact.head(exact.sequential(torch.from_numpy(ids))[0].hidden).numpy()
    emulated = emulate_w8a8(half, linears)
    expected = emulated.head(emulated.sequential(torch.from_numpy(ids))[0].hidden).float().numpy()
    found = step_chain(quantized["step"][0], exact, ids)
    spread = reference.std()
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.01 * spread, "the graph is not what the emulation computes"
    assert np.sqrt(np.mean((found - reference) ** 2)) < 0.02 * spread


def test_a_prefill_of_one_token_is_the_step_at_any_number_of_passes(
    quantized: dict[str, tuple[ir.Model, int]], small: Checkpoint, run_graph: Callable[..., dict[str, np.ndarray]]
) -> None:
    config = small.config
    (cache,) = config.carried.caches[:1]
    shape = (2, cache.heads, 8, cache.head_dim)
    caches = {f"past_key_values.0.{part}": np.zeros(shape, np.float16) for part in ("key", "value")}
    state = np.random.default_rng(0).normal(size=(2, 1, config.hidden_size)).astype(np.float32)
    common = {"input_ids": np.array([[65], [66]]), "position": np.zeros(2, np.int64), "state": state, **caches}
    chunk = {"length": np.ones(2, np.int64), "hidden": np.zeros_like(state)}
    step = run_graph(quantized["step"][0], common)
    prefill = run_graph(quantized["prefill"][0], {**common, **chunk})
    assert np.array_equal(step["logits"], prefill["logits"])
    assert np.array_equal(step["next_state"], prefill["next_state"])


def test_the_result_does_not_depend_on_who_else_is_in_the_call(
    quantized: dict[str, tuple[ir.Model, int]], small: Checkpoint, run_graph: Callable[..., dict[str, np.ndarray]]
) -> None:
    hidden = np.random.default_rng(1).normal(size=(3, 5, small.config.hidden_size)).astype(np.float32)
    together = run_graph(quantized["head"][0], {"hidden": hidden})["logits"]
    alone = run_graph(quantized["head"][0], {"hidden": hidden[1:2, 2:3]})["logits"]
    np.testing.assert_allclose(alone[0, 0], together[1, 2], atol=1e-6)


def test_a_weight_behind_a_transpose_is_reported(exported: Exported, linears: QuantizedLinears) -> None:
    graph = exported("head", torch.float16)
    (node,) = [n for n in graph.graph if n.op_type == "MatMul"]
    weight = graph.graph.initializers["lm_head.weight"]
    flipped = weight.const_value.numpy().T  # type: ignore[union-attr]
    weight.const_value, weight.shape = ir.tensor(flipped, name="lm_head.weight"), ir.Shape(flipped.shape)
    transpose = ir.node("Transpose", [weight], {"perm": [1, 0]}, name="hidden_transpose")
    transpose.outputs[0].name = "hidden_weight"
    graph.graph.insert_before(node, transpose)
    node.replace_input_with(1, transpose.outputs[0])
    with pytest.raises(BuildError, match=r"(?s)2 problems.*by a constant matrix.*lm_head\.weight is read by Transpose"):
        quantize_w8a8(graph, linears)


def test_a_weight_under_a_foreign_name_is_reported(exported: Exported, linears: QuantizedLinears) -> None:
    graph = exported("head", torch.float16)
    graph.graph.initializers["lm_head.weight"].name = "folded_constant"
    with pytest.raises(BuildError, match="multiplies by a constant matrix"):
        quantize_w8a8(graph, linears)


def test_a_missing_bias_add_is_reported(exported: Exported, linears: QuantizedLinears) -> None:
    graph = exported("head", torch.float16)
    graph.graph.initializers["lm_head.bias"].name = "another.bias"
    with pytest.raises(BuildError, match=r"expected Add of lm_head\.bias after MatMul"):
        quantize_w8a8(graph, linears)


def test_a_plan_for_another_model_is_refused(exported: Exported, linears: QuantizedLinears) -> None:
    graph = exported("head", torch.float16)
    smaller = dataclasses.replace(linears, linears={})
    with pytest.raises(BuildError, match=r"another model: lm_head\.weight is not in the plan"):
        quantize_w8a8(graph, smaller)
    head = linears.linears["lm_head"]
    head = dataclasses.replace(head, weight=head.weight[:, :9])
    with pytest.raises(BuildError, match=r"is \[32, 256\], the plan has \[32, 9\]"):
        quantize_w8a8(graph, dataclasses.replace(linears, linears={"lm_head": head}))


def test_an_unknown_graph_has_no_expected_count(small: Checkpoint) -> None:
    with pytest.raises(InputError, match="found 'decode'"):
        expected_matmuls(small.config, "decode")
