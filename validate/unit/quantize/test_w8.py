from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch

from crt_export.checkpoint import Checkpoint
from crt_export.errors import BuildError
from crt_export.graph.export import GraphExporter
from crt_export.graph.weights import SharedArrays
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity.stored_weights import BlockWeight, deviation
from crt_export.quantize import smoothing, w8
from crt_export.quantize.linears import expected_matmuls, linear_names, weight_matmuls
from crt_export.quantize.plan import SMALLEST_STEP
from crt_export.quantize.smoothing import balanced, smooth_norms
from crt_export.quantize.w8 import BLOCK_SIZE, fuse_projections, quantize_blocks, quantize_w8

Exported = Callable[[str, torch.dtype], ir.Model]
RunGraph = Callable[[ir.Model, dict[str, np.ndarray]], dict[str, np.ndarray]]


def _single(weight: np.ndarray) -> ir.Model:
    """``y = x @ weight`` as a graph."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch", weight.shape[0]])
    value = ir.val("linear.weight", const_value=ir.tensor(weight, name="linear.weight"))
    node = ir.node("MatMul", [x, value], name="product")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["batch", weight.shape[1]])
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=[value], opset_imports={"": 24}, name="single")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("into", "out"), [(256, 32), (170, 33), (128, 7), (100, 5), (16, 16)])
def test_blocks_are_bit_equal_to_onnx_runtimes_quantiser(into: int, out: int) -> None:
    native = pytest.importorskip("onnxruntime.capi._pybind_state").quantize_matmul_8bits
    weight = np.random.default_rng(into).normal(size=(into, out)).astype(np.float32)
    weight[:, 0] = 0
    block, blocks = BLOCK_SIZE, -(-into // BLOCK_SIZE)
    packed = np.zeros((out, blocks, block), np.uint8)
    scales, zeros = np.zeros((out, blocks), np.float32), np.zeros((out, blocks), np.uint8)
    padded = np.pad(weight, ((0, blocks * block - into), (0, 0)))
    native(packed, padded, scales, zeros, block, out, into, True)
    found, found_scales = quantize_blocks(weight)
    assert np.array_equal(found_scales, scales)
    # The native quantiser leaves the padding of the last block unset; the kernel never reads it.
    real = np.arange(blocks * block).reshape(blocks, block) < into
    assert np.array_equal(found[:, real], packed[:, real])


@pytest.mark.parametrize("magnitude", [1e-45, 1e-42, 3e-39, 1e-37, 1.5e-36, 1.6e-36, 1e-20, 1e30, 3.4e38])
def test_blocks_of_any_magnitude_are_right_to_half_a_step(magnitude: float) -> None:
    """Weight decay brings dead rows down to subnormal numbers; pytest makes errors of numpy's warnings."""
    weight = np.zeros((BLOCK_SIZE, 3), np.float32)
    weight[:, 0] = magnitude * np.linspace(-0.9, 1, BLOCK_SIZE)
    weight[3, 0] = 0
    weight[::2, 1] = -magnitude
    weight[:, 2] = 0.5
    levels, scales = quantize_blocks(weight)
    back = (levels.astype(np.float64) - 128) * scales[:, :, None]
    step = np.maximum(np.abs(scales.astype(np.float64)), 0 if scales[0, 0] else 2 * 128 * SMALLEST_STEP)
    # 128 steps up do not exist: what would round there is half a step further away.
    assert np.all(np.abs(back[:, 0] - weight.T) <= step * np.where(levels[:, 0] == 255, 1.001, 0.501))
    assert np.isfinite(scales).all()
    assert (scales[:2] == 0).all() == (magnitude < 128 * SMALLEST_STEP)
    stored = BlockWeight(blocks=levels, scales=scales, into=BLOCK_SIZE)
    worst, problem = deviation(stored, np.ascontiguousarray(weight.T), np.ones(BLOCK_SIZE, np.float32), limit=0.51)
    assert problem is None
    assert worst <= 0.51


def test_a_block_that_was_lost_is_still_found() -> None:
    weight = np.full((1, 32), 1e-30, np.float32)
    lost = BlockWeight(blocks=np.full((1, 1, 32), 128, np.uint8), scales=np.zeros((1, 1), np.float32), into=32)
    assert deviation(lost, weight, np.ones(32, np.float32), limit=0.51)[1] is not None


@pytest.mark.parametrize(("gain", "weight"), [(1e38, 1e-38), (1e-40, 3e38), (3e38, 3e38), (1e-44, 1e-44)])
def test_smoothing_stays_inside_the_range_of_fp32(gain: float, weight: float) -> None:
    gains = np.full(8, gain, np.float32)
    gains[0] = 1
    weights = np.full((8, 4), weight, np.float32)
    weights[1] = 1
    found = balanced(gains, np.zeros(8, np.float32), weights, biased=True)
    assert all(np.isfinite(values).all() for values in found)
    assert np.count_nonzero(found[1]) == 0


@pytest.mark.parametrize("into", [64, 70, 300])
def test_the_kernel_computes_what_the_blocks_say(into: int, run_graph: RunGraph) -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(into, 24)).astype(np.float32)
    weight[:, 3] = 0
    weight[:128, 4] = 0
    x = generator.normal(size=(3, into)).astype(np.float32)
    packed, scales = quantize_blocks(weight)
    dequantized = ((packed.astype(np.float32) - 128) * scales[:, :, None]).reshape(24, -1)[:, :into]
    graph = _single(weight)
    assert quantize_w8(graph) == 1
    y = run_graph(graph, {"x": x})["y"]
    assert np.isfinite(y).all()
    assert np.all(y[:, 3] == 0)
    np.testing.assert_allclose(y, x @ dequantized.T, atol=0.02 * np.abs(y).max())
    np.testing.assert_allclose(dequantized.T, weight, atol=np.abs(weight).max() / 200)


@pytest.mark.parametrize("name", ["step", "head"])
def test_every_linear_of_every_graph_is_replaced(name: str, exported: Exported, small: Checkpoint) -> None:
    graph = exported(name, torch.float32)
    count = quantize_w8(graph)
    assert count == expected_matmuls(small.config, name, 2)
    nodes = [node for node in graph.graph if node.op_type == "MatMulNBits"]
    fused = len(small.config.carried.caches) if name == "step" else 0
    assert len(nodes) == count - 2 * fused, "query, key and value are one product"
    assert sum(node.op_type == "Split" and len(node.outputs) == 3 for node in graph.graph) == fused
    assert not any(node.op_type == "MatMul" for node in graph.graph)
    assert all(node.attributes["accuracy_level"].as_int() == 4 for node in nodes)
    assert not any(f"{linear}.weight" in graph.graph.initializers for linear in linear_names(small.config))
    assert graph.opset_imports["com.microsoft"] == 1


def test_weights_are_the_same_by_name_in_every_graph(exported: Exported) -> None:
    step, head = (exported(name, torch.float32) for name in ("step", "head"))
    quantize_w8(step)
    quantize_w8(head)
    shared = [name for name in head.graph.initializers if "." in name]
    assert {"lm_head.weight_blocks", "lm_head.weight_scales", "lm_head.bias"} < set(shared)
    for name in shared:
        values = [graph.graph.initializers[name].const_value for graph in (step, head)]
        assert values[0].tobytes() == values[1].tobytes()  # type: ignore[union-attr]


def test_graphs_with_one_memo_are_quantised_once_to_the_same_bytes(
    small: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = GraphExporter(model_from_checkpoint(small))
    alone, together = ([exporter.graph(name) for name in ("step", "head")] for _ in range(2))
    shared, calls = SharedArrays(), []
    for graph in alone:
        quantize_w8(graph)
    monkeypatch.setattr(w8, "quantize_blocks", lambda weight: calls.append(1) or quantize_blocks(weight))
    for graph in together:
        quantize_w8(graph, shared)
    assert len(calls) == sum(name.endswith("_blocks") for name in together[0].graph.initializers)
    for one, other in zip(alone, together, strict=True):
        assert ir.to_proto(one).SerializeToString() == ir.to_proto(other).SerializeToString()


def test_a_memo_makes_anew_what_lies_elsewhere_or_is_made_otherwise() -> None:
    shared, one = SharedArrays(), np.arange(6, dtype=np.float32)
    (first,) = shared.made("twice", [one], lambda: (one * 2,))
    assert shared.made("twice", [one[:]], lambda: (one * 0,))[0] is first
    for how, array in (("half", one), ("twice", one[:3]), ("twice", one.reshape(2, 3)), ("twice", one.copy())):
        (made,) = shared.made(how, [array], lambda: (np.zeros(1),))
        assert made is not first


def test_passes_share_one_quantised_weight() -> None:
    graph = _single(np.ones((32, 32), np.float32))
    (first,) = graph.graph
    second = ir.node("MatMul", [first.outputs[0], first.inputs[1]], name="second")
    second.outputs[0].name, second.outputs[0].dtype = "z", ir.DataType.FLOAT
    graph.graph.append(second)
    graph.graph.outputs[0] = second.outputs[0]
    assert quantize_w8(graph) == 2
    assert set(graph.graph.initializers) == {"linear.weight_blocks", "linear.weight_scales"}
    assert [node.name for node in graph.graph] == ["product", "second"]


def test_fused_projections_compute_what_three_do(exported: Exported, run_graph: RunGraph, small: Checkpoint) -> None:
    """In FP32 and in blocks: every output keeps its own weights, so nothing changes but the number of products."""
    separate, fused = (exported("step", torch.float32) for _ in range(2))
    assert fuse_projections(fused.graph, SharedArrays()) == 3 * len(small.config.carried.caches)
    names = {name for name, _ in weight_matmuls(fused.graph)}
    assert "layers.0.attn.qkv" in names
    assert not names & {f"layers.0.attn.{part}" for part in "qkv"}
    inputs = _step_inputs(separate)
    for graphs in ((separate, fused), (_quantised(separate, three=True), _quantised(fused, three=False))):
        before, after = (run_graph(graph, inputs) for graph in graphs)
        for name, value in before.items():
            np.testing.assert_allclose(after[name], value, rtol=0, atol=2e-6, err_msg=name)


def test_projections_that_do_not_read_the_same_stay_apart(exported: Exported) -> None:
    graph = exported("step", torch.float32)
    products = dict(weight_matmuls(graph.graph))
    products["layers.0.attn.k"].replace_input_with(0, products["correction.up"].inputs[0])
    assert fuse_projections(graph.graph, SharedArrays()) == 0
    assert set(dict(weight_matmuls(graph.graph))) == set(products)


def _step_inputs(graph: ir.Model) -> dict[str, np.ndarray]:
    generator, sizes = np.random.default_rng(0), {"batch": 2, "capacity": 5}
    values = {}
    for value in graph.graph.inputs:
        assert value.shape is not None
        shape = [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape]
        whole = value.dtype == ir.DataType.INT64
        values[str(value.name)] = (
            generator.integers(0, 4, shape) if whole else generator.normal(size=shape).astype(np.float32)
        )
    return values


def _quantised(graph: ir.Model, *, three: bool) -> ir.Model:
    """``w8`` of a graph; ``three`` keeps query, key and value apart by taking their biases for those of no linear."""
    copy = graph.clone()
    if not three:
        quantize_w8(copy)
        return copy
    biases = [value for name, value in copy.graph.initializers.items() if ".attn." in name and name.endswith(".bias")]
    for value in biases:
        value.name = f"{value.name}.apart"
    quantize_w8(copy)
    return copy


def test_the_step_chain_follows_pytorch(
    exported: Exported, small: Checkpoint, step_chain: Callable[..., np.ndarray], text_tokens: np.ndarray
) -> None:
    model = model_from_checkpoint(small)
    ids = text_tokens[: 4 * 24].reshape(4, 24)
    reference = model.head(model.sequential(torch.from_numpy(ids))[0].hidden).numpy()
    graph = exported("step", torch.float32)
    quantize_w8(graph)
    error = np.abs(step_chain(graph, model, ids) - reference)
    assert 0 < error.max() < 0.05 * reference.std()


def test_half_precision_graphs_are_refused(exported: Exported) -> None:
    with pytest.raises(BuildError, match="weight-only quantisation expects FLOAT weights: lm_head"):
        quantize_w8(exported("head", torch.float16))


def test_smoothing_levels_outliers_and_leaves_the_function_alone(
    exported: Exported,
    small: Checkpoint,
    with_outliers: Callable[[LanguageModel, float], LanguageModel],
    step_chain: Callable[..., np.ndarray],
    text_tokens: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_from_checkpoint(small)
    ids = text_tokens[: 4 * 24].reshape(4, 24)
    reference = model.head(model.sequential(torch.from_numpy(ids))[0].hidden).numpy()
    scaled = {name: tensor.numpy() for name, tensor in with_outliers(model, 50.0).state_dict().items()}
    errors = {}
    for smooth in (True, False):
        graph = exported("step", torch.float32)
        for name, value in graph.graph.initializers.items():
            if name in scaled:
                value.const_value = ir.tensor(scaled[name].copy(), name=name)
        if not smooth:
            monkeypatch.setattr(smoothing, "balancing_exponents", lambda activation, _: np.zeros(activation.shape))
        quantize_w8(graph)
        errors[smooth] = np.sqrt(np.mean((step_chain(graph, model, ids) - reference) ** 2))
    assert errors[True] < 0.02 * reference.std()
    assert errors[False] > 5 * errors[True], "without smoothing this model shows nothing: it is no test"


def test_smoothed_norms_are_the_same_in_every_graph_and_exact(exported: Exported, run_graph: RunGraph) -> None:
    graphs = [exported(name, torch.float32) for name in ("step", "head")]
    for graph in graphs:
        gain = graph.graph.initializers["final_norm.weight"]
        values = gain.const_value.numpy().copy()  # type: ignore[union-attr]
        values[:3] *= 100
        gain.const_value = ir.tensor(values, name=gain.name)
    hidden = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
    before = run_graph(graphs[1], {"hidden": hidden})["logits"]
    for graph in graphs:
        smooth_norms(weight_matmuls(graph.graph), SharedArrays())
    for name in ("final_norm.weight", "final_norm.bias", "lm_head.weight"):
        one, other = (graph.graph.initializers[name].const_value.numpy() for graph in graphs)  # type: ignore[union-attr]
        assert np.array_equal(one, other)
    assert np.abs(graphs[1].graph.initializers["final_norm.weight"].const_value.numpy()).max() < 50  # type: ignore[union-attr]
    after = run_graph(ir.from_proto(ir.to_proto(graphs[1])), {"hidden": hidden})["logits"]
    assert np.array_equal(before, after)
