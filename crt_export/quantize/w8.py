"""W8: weight-only int8 for ONNX Runtime on a CPU (``com.microsoft.MatMulNBits``).

Weights are quantised in blocks along the input, symmetric, with the operator's default zero point of 128. Accuracy
level 4 lets the kernel quantise each row of the activations on its own: one call of many tokens and many calls of one
token agree but for the order of sums, which now and then rounds an activation the other way.

Query, key and value, three linears that read one activation, become a single wider one, and so do gate and up of a
gated MLP. A decode step is bound by the weights it reads, and one large product reads them faster than several small
ones. Each output keeps its own weights and bias, and quantised blocks lie along the input, so no value changes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from crt_export.errors import BuildError, problem_list
from crt_export.graph.weights import SharedArrays
from crt_export.quantize.linears import constant, require_none_left, weight_matmuls
from crt_export.quantize.plan import SMALLEST_STEP
from crt_export.quantize.smoothing import smooth_norms

DOMAIN = "com.microsoft"
#: Inputs that share a scale.
BLOCK_SIZE = 128
_BITS = 8
_ZERO = 128
_INT8_ACCURACY = 4
#: Name of a wide linear, beside its parts.
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
_FUSED_OF_PART = {part: fused for fused, parts in FUSED.items() for part in parts}


def quantize_w8(graph: ir.Model, shared: SharedArrays | None = None) -> int:
    """Balance LayerNorms against the weights that read them, then replace every MatMul with a weight by MatMulNBits.

    Args:
        graph: An FP32 graph with weights under their checkpoint names; it is changed in place.
        shared: Of the graphs of one model, which share their weights; None: this graph has no others beside it.

    Returns:
        Number of replaced MatMuls, each part of a wider one counted, a weight used by K passes counted K times.

    Raises:
        BuildError: A linear could not be replaced.
    """
    body, shared = graph.graph, shared or SharedArrays()
    linears = weight_matmuls(body)
    _check_dtype(body, linears)
    fuse_projections(body, shared)
    matmuls = weight_matmuls(body)
    smooth_norms(matmuls, shared)
    for name, node in matmuls:
        _replace(body, name, node, shared)
    RemoveUnusedNodesPass()(graph)
    require_none_left(body, {name for name, _ in (*linears, *matmuls)})
    body.opset_imports[DOMAIN] = 1
    return len(linears)


def quantize_blocks(
    weight: NDArray[np.float32], block_size: int = BLOCK_SIZE
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantise in blocks along the input, as ONNX Runtime's own quantiser does.

    The scale is the block's value of largest magnitude over -128, so that this value uses the whole range.

    Args:
        weight: float32 [in, out].
        block_size: Values of a block.

    Returns:
        uint8 [out, blocks, block_size] with zero at 128, the last block of a column padded with zeros, and scales
        float32 [out, blocks], 0 for a block of zeros and for one whose scale would be below
        :data:`crt_export.quantize.plan.SMALLEST_STEP`.
    """
    into, out = weight.shape
    blocks = -(-into // block_size)
    padded = np.zeros((out, blocks * block_size), np.float32)
    padded[:, :into] = weight.T
    padded = padded.reshape(out, blocks, block_size)
    low, high = padded.min(axis=2), padded.max(axis=2)
    scale = np.where(np.abs(high) > np.abs(low), high, low) / np.float32(-_ZERO)
    scale[np.abs(scale) < SMALLEST_STEP] = 0
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    levels = padded * inverse[:, :, None] + np.float32(_ZERO)
    return np.clip(np.floor(levels + np.float32(0.5)), 0, 255).astype(np.uint8), scale


def _check_dtype(graph: ir.Graph, matmuls: list[tuple[str, ir.Node]]) -> None:
    found = {f"{name}.weight": graph.initializers[f"{name}.weight"].dtype for name, _ in matmuls}
    problems = [f"{name} is {dtype}" for name, dtype in sorted(found.items()) if dtype != ir.DataType.FLOAT]
    if problems:
        raise BuildError(problem_list(f"graph {graph.name}: weight-only quantisation expects FLOAT weights", problems))


def _replace(graph: ir.Graph, name: str, node: ir.Node, shared: SharedArrays) -> None:
    packed_name, scales_name = f"{name}.weight_blocks", f"{name}.weight_scales"
    tensor = graph.initializers[f"{name}.weight"].const_value
    assert tensor is not None
    into, out = tensor.numpy().shape
    if packed_name not in graph.initializers:
        weight = tensor.numpy()
        packed, scales = shared.made("blocks", [weight], lambda: quantize_blocks(weight))
        constant(graph, packed_name, packed)
        constant(graph, scales_name, scales)
    old = node.outputs[0]
    attributes = {"K": into, "N": out, "bits": _BITS, "block_size": BLOCK_SIZE, "accuracy_level": _INT8_ACCURACY}
    new = ir.node(
        "MatMulNBits",
        [node.inputs[0], graph.initializers[packed_name], graph.initializers[scales_name]],
        attributes,
        domain=DOMAIN,
        name=node.name,
        outputs=[ir.val(old.name, old.dtype, old.shape)],
    )
    graph.insert_before(node, new)
    old.replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def fuse_projections(graph: ir.Graph, shared: SharedArrays) -> int:
    """Replace ``x @ q + bq``, ``x @ k + bk``, ``x @ v + bv`` by ``Split(x @ qkv + bqkv)``, in place; likewise gate, up.

    What is not of that form (another activation, a bias here and none there, an intermediate result that others read)
    is left alone. The parts' weights and biases stay as initializers that nothing reads.

    Args:
        graph: Linears are MatMuls by ``{name}.weight`` [in, out], each followed by an Add of ``{name}.bias`` if there
            is such a bias.
        shared: Of the graphs that share these weights.

    Returns:
        The number of products that were replaced, each part of a wider one counted.
    """
    candidates: dict[tuple[int, str, str], dict[str, ir.Node]] = {}
    for name, node in weight_matmuls(graph):
        stem, _, part = name.rpartition(".")
        if part in _FUSED_OF_PART:
            candidates.setdefault((id(node.inputs[0]), stem, _FUSED_OF_PART[part]), {})[part] = node
    replaced = 0
    for (_, stem, fused), nodes in candidates.items():
        if set(nodes) != set(FUSED[fused]):
            continue
        parts = {part: nodes[part] for part in FUSED[fused]}
        biased = [part for part in parts if f"{stem}.{part}.bias" in graph.initializers]
        sums = {part: _bias_add(graph, f"{stem}.{part}", parts[part]) for part in biased}
        adds = [add for add in sums.values() if add is not None]
        if len(adds) in (0, len(parts)) and len(adds) == len(biased):
            _fuse(graph, stem, fused, [*parts.values()], adds, shared)
            replaced += len(parts)
    return replaced


def _bias_add(graph: ir.Graph, name: str, product: ir.Node) -> ir.Node | None:
    users = [user for user, _ in product.outputs[0].uses()]
    bias = graph.initializers.get(f"{name}.bias")
    if len(users) != 1 or users[0].op_type != "Add" or bias is None or bias not in users[0].inputs:
        return None
    return users[0]


def _fuse(
    graph: ir.Graph, stem: str, fused: str, products: list[ir.Node], adds: list[ir.Node], shared: SharedArrays
) -> None:
    weight = _joined(graph, stem, fused, "weight", shared)
    first = products[0]
    made = [_node(first, fused, "MatMul", [first.inputs[0], weight])]
    if adds:
        bias = _joined(graph, stem, fused, "bias", shared)
        made.append(_node(adds[0], fused, "Add", [made[0].outputs[0], bias]))
    results = [node.outputs[0] for node in adds or products]
    outputs = [ir.val(value.name, value.dtype, value.shape) for value in results]
    made.append(_split(graph, stem, fused, made[-1].outputs[0], first, outputs))
    earliest = next(node for node in graph if node in products)
    graph.insert_before(earliest, made)
    for old, new in zip(results, outputs, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    for node in (*adds, *products):
        graph.remove(node, safe=True)


def _split(graph: ir.Graph, stem: str, fused: str, wide: ir.Value, origin: ir.Node, outputs: list[ir.Value]) -> ir.Node:
    """Cut the wide result; where parts differ in width, which grouped queries do, their widths are a constant."""
    widths = [_width(graph, f"{stem}.{part}.weight") for part in FUSED[fused]]
    inputs, attributes = [wide], {"axis": -1, "num_outputs": len(outputs)}
    if len(set(widths)) > 1:
        inputs.append(constant(graph, name_of_widths(f"{stem}.{fused}"), np.array(widths, np.int64)))
        del attributes["num_outputs"]
    return ir.node("Split", inputs, attributes, name=f"{origin.name}/split", outputs=outputs)


def name_of_widths(linear: str) -> str:
    """Name of the constant that says how wide the parts of a wide linear are; it lies in the graph, as shapes do."""
    return f"{linear}_widths".replace(".", "_")


def _width(graph: ir.Graph, name: str) -> int:
    tensor = graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().shape[1]


def _joined(graph: ir.Graph, stem: str, fused: str, kind: str, shared: SharedArrays) -> ir.Value:
    """The parts' weights [in, out] or biases [out] side by side, made once for all passes."""
    name = f"{stem}.{fused}.{kind}"
    if name in graph.initializers:
        return graph.initializers[name]
    tensors = [graph.initializers[f"{stem}.{part}.{kind}"].const_value for part in FUSED[fused]]
    arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
    (joined,) = shared.made("joined", arrays, lambda: (np.concatenate(arrays, axis=-1),))
    return constant(graph, name, joined)


def _node(origin: ir.Node, fused: str, operator: str, inputs: list[ir.Value | None]) -> ir.Node:
    """A node in place of the first part's; its last axis is as wide as those of all parts together."""
    narrow = origin.outputs[0]
    dims = [*narrow.shape][:-1] if narrow.shape is not None else None
    wide = inputs[1].shape if inputs[1] is not None else None
    shape = ir.Shape([*dims, wide[-1]]) if dims is not None and wide is not None else None
    output = ir.val(f"{narrow.name}/{fused}", narrow.dtype, shape)
    return ir.node(operator, inputs, name=f"{origin.name}/{fused}", outputs=[output])
