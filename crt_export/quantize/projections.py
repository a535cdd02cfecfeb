"""Query, key and value as one product: three linears that read one activation become a single wider one.

A decode step is bound by the weights it reads, and one large product reads them faster than three small ones. Each
output keeps its own weights and bias, and quantised blocks lie along the input, so no value changes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from crt_export.memo import Memo
from crt_export.quantize.weights import constant, weight_matmuls

_PROJECTIONS = ("q", "k", "v")
#: Name of the wide linear beside its parts ``q``, ``k`` and ``v``.
FUSED = "qkv"


def fuse_projections(graph: ir.Graph, memo: Memo) -> int:
    """Replace ``x @ q + bq``, ``x @ k + bk`` and ``x @ v + bv`` by ``Split(x @ qkv + bqkv)``, in place.

    What is not of that form (another activation, no bias, an intermediate result that others read) is left alone. The
    parts' weights and biases stay as initializers that nothing reads.

    Args:
        graph: Linears are MatMuls by ``{name}.weight`` [in, out], each followed by an Add of ``{name}.bias``.
        memo: Of the graphs that share these weights.

    Returns:
        The number of products that were replaced, three for each fused one.
    """
    candidates: dict[tuple[int, str], dict[str, ir.Node]] = {}
    for name, node in weight_matmuls(graph):
        stem, _, part = name.rpartition(".")
        if part in _PROJECTIONS:
            candidates.setdefault((id(node.inputs[0]), stem), {})[part] = node
    replaced = 0
    for (_, stem), nodes in candidates.items():
        parts = {part: nodes[part] for part in _PROJECTIONS if part in nodes}
        sums = {part: _bias_add(graph, f"{stem}.{part}", node) for part, node in parts.items()}
        adds = [add for add in sums.values() if add is not None]
        if len(adds) == len(_PROJECTIONS):
            _fuse(graph, stem, [*parts.values()], adds, memo)
            replaced += len(parts)
    return replaced


def _bias_add(graph: ir.Graph, name: str, product: ir.Node) -> ir.Node | None:
    users = [user for user, _ in product.outputs[0].uses()]
    bias = graph.initializers.get(f"{name}.bias")
    if len(users) != 1 or users[0].op_type != "Add" or bias is None or bias not in users[0].inputs:
        return None
    return users[0]


def _fuse(graph: ir.Graph, stem: str, products: list[ir.Node], adds: list[ir.Node], memo: Memo) -> None:
    weight = _joined(graph, stem, "weight", memo)
    bias = _joined(graph, stem, "bias", memo)
    first = products[0]
    product = _node(first, "MatMul", [first.inputs[0], weight])
    total = _node(adds[0], "Add", [product.outputs[0], bias])
    results = [add.outputs[0] for add in adds]
    outputs = [ir.val(value.name, value.dtype, value.shape) for value in results]
    attributes = {"axis": -1, "num_outputs": len(outputs)}
    split = ir.node("Split", [total.outputs[0]], attributes, name=f"{first.name}/split", outputs=outputs)
    earliest = next(node for node in graph if node in products)
    graph.insert_before(earliest, [product, total, split])
    for old, new in zip(results, outputs, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    for node in (*adds, *products):
        graph.remove(node, safe=True)


def _joined(graph: ir.Graph, stem: str, kind: str, memo: Memo) -> ir.Value:
    """The parts' weights [in, out] or biases [out] side by side, made once for all passes."""
    name = f"{stem}.{FUSED}.{kind}"
    if name in graph.initializers:
        return graph.initializers[name]
    tensors = [graph.initializers[f"{stem}.{part}.{kind}"].const_value for part in _PROJECTIONS]
    arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
    (joined,) = memo.made("joined", arrays, lambda: (np.concatenate(arrays, axis=-1),))
    return constant(graph, name, joined)


def _node(origin: ir.Node, operator: str, inputs: list[ir.Value | None]) -> ir.Node:
    """A node in place of the first of three; its last axis is as wide as theirs together."""
    narrow = origin.outputs[0]
    dims = [*narrow.shape][:-1] if narrow.shape is not None else None
    wide = inputs[1].shape if inputs[1] is not None else None
    shape = ir.Shape([*dims, wide[-1]]) if dims is not None and wide is not None else None
    output = ir.val(f"{narrow.name}/{FUSED}", narrow.dtype, shape)
    return ir.node(operator, inputs, name=f"{origin.name}/{FUSED}", outputs=[output])
