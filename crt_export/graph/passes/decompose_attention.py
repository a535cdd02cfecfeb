"""Pass: ``Attention`` becomes MatMul, Softmax and MatMul, for models that have no fused attention kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir

from crt_export.errors import BuildError, UnsupportedError, problem_list
from crt_export.models.declaration import Carried
from crt_export.profile import EngineProfile

# Measured with TensorRT-RTX 1.7.1 for SM 8.0: no fused kernel for head_dim 8, 68, 70 and 512, or for 1 to 3 heads.
_HEAD_DIM_MULTIPLE = 8
_HEAD_DIMS = range(16, 257)
_FEWEST_HEADS = 4


def attention_of_profile(profile: EngineProfile, carried: Carried) -> Literal["fused", "decomposed"]:
    """Choose how a target's graphs compute attention.

    Args:
        profile: ``attention = "auto"`` takes a fused node wherever there is a kernel for it.
        carried: Heads and head_dim of the caches decide that.

    Raises:
        UnsupportedError: The profile insists on ``fused`` and there is no kernel.
    """
    if not profile.compiled:
        return "fused"
    obstacles = []
    if profile.cache_dtype != "float16":
        obstacles.append(f"precision {profile.precision} computes attention in {profile.cache_dtype}, not float16")
    for head_dim in sorted({cache.head_dim for cache in carried.caches}):
        if head_dim % _HEAD_DIM_MULTIPLE:
            obstacles.append(f"head_dim {head_dim} is no multiple of {_HEAD_DIM_MULTIPLE}")
        if head_dim not in _HEAD_DIMS:
            obstacles.append(f"head_dim {head_dim} is outside {_HEAD_DIMS.start} to {_HEAD_DIMS.stop - 1}")
    for heads in sorted({cache.query_heads for cache in carried.caches}):
        if heads < _FEWEST_HEADS:
            obstacles.append(f"{heads} heads are fewer than {_FEWEST_HEADS}")
    if profile.attention == "fused" and obstacles:
        heading = f'target {profile.name}: no kernel for attention = "fused" (use "auto" or "decomposed")'
        raise UnsupportedError(problem_list(heading, obstacles))
    return "decomposed" if obstacles or profile.attention == "decomposed" else "fused"


def decompose_attention(graph: ir.Model) -> int:
    """Replace every ``Attention`` node by ``Softmax(Where(mask, (scale * q) @ k^T, lowest)) @ v``.

    Masked scores become the lowest finite number of the type, not -inf: a row without any allowed key then gives
    the mean of the values instead of NaN, and in FP16 no score can lie below it.

    Requires: each Attention has query, key, value [batch, heads, n, head_dim] and a bool mask, an explicit scale,
        one output, and neither softcap nor is_causal.
    Ensures: no Attention is left; the outputs keep their names, types and shapes.

    Returns:
        The number of nodes replaced.

    Raises:
        BuildError: Lists every node that is something else; the graph is unchanged then.
    """
    nodes = [node for node in graph.graph.all_nodes() if node.op_type == "Attention"]
    problems = [f"{node.name}: {problem}" for node in nodes for problem in _problems_of_node(node)]
    if problems:
        raise BuildError(problem_list(f"graph {graph.graph.name}: attention cannot be decomposed", problems))
    for node in nodes:
        _replace(graph.graph, node)
    left = [str(node.name) for node in graph.graph.all_nodes() if node.op_type == "Attention"]
    if left:
        raise BuildError(f"graph {graph.graph.name}: Attention nodes are left: {', '.join(left)}")
    return len(nodes)


def _problems_of_node(node: ir.Node) -> Iterator[str]:
    given = [value for value in node.inputs if value is not None]
    if len(given) != 4 or len(node.inputs) != 4 or len(node.outputs) != 1:
        yield f"{len(given)} inputs and {len(node.outputs)} outputs; query, key, value, mask and one output expected"
        return
    if any(value.shape is None or len(value.shape) != 4 for value in given):
        yield "inputs must be 4-D with known rank"
    if given[3].dtype != ir.DataType.BOOL:
        yield f"the mask is {given[3].dtype}, not BOOL"
    if given[0].dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        yield f"the query is {given[0].dtype}, not FLOAT or FLOAT16"
    if "scale" not in node.attributes:
        yield "no explicit scale"
    for name in ("is_causal", "softcap", "qk_matmul_output_mode"):
        if name in node.attributes and node.attributes[name].value != 0:
            yield f"{name} = {node.attributes[name].value} is not supported"


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    query, key, value, mask = node.inputs
    assert query is not None
    assert query.dtype is not None
    numpy_type = query.dtype.numpy()
    scale = _constant(graph, node, "scale", np.array(node.attributes["scale"].as_float(), numpy_type))
    lowest = _constant(graph, node, "lowest", np.array(np.finfo(numpy_type).min, numpy_type))
    nodes = [_node(node, "Mul", "scaled_query", [query, scale])]
    groups = _groups(query, key)
    if groups > 1:  # the queries of a group as rows: no key or value is expanded
        nodes += _stacked(graph, node, nodes[-1].outputs[0], mask, groups)
        mask = nodes[-1].outputs[0]
        scaled = nodes[1].outputs[0]
    else:
        scaled = nodes[0].outputs[0]
    turned = _node(node, "Transpose", "key_transposed", [key], perm=[0, 1, 3, 2])
    scores = _node(node, "MatMul", "scores", [scaled, turned.outputs[0]])
    masked = _node(node, "Where", "masked", [mask, scores.outputs[0], lowest])
    shares = _node(node, "Softmax", "shares", [masked.outputs[0]], axis=-1)
    mix = _node(node, "MatMul", "mix", [shares.outputs[0], value])
    nodes += [turned, scores, masked, shares, mix]
    if groups > 1:
        shape = _shape_constant(graph, node, "heads_apart", [0, _heads(query), -1, _size(query, 3)])
        nodes.append(_node(node, "Reshape", "apart", [mix.outputs[0], shape]))
    old, new = node.outputs[0], nodes[-1].outputs[0]
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    name, new.shape, new.type = old.name, old.shape, old.type
    graph.remove(node, safe=True)
    new.name = name


def _stacked(graph: ir.Graph, node: ir.Node, query: ir.Value, mask: ir.Value | None, groups: int) -> list[ir.Node]:
    """Queries [batch, heads, n, head_dim] -> [batch, kv_heads, groups * n, head_dim]; the mask's rows repeat."""
    key = node.inputs[1]
    assert key is not None
    shape = _shape_constant(graph, node, "heads_together", [0, _heads(key), -1, _size(key, 3)])
    together = _node(node, "Reshape", "stacked_query", [query, shape])
    repeated = _node(node, "Concat", "stacked_mask", [mask] * groups, axis=2)
    return [together, repeated]


def _groups(query: ir.Value, key: ir.Value | None) -> int:
    """Query heads that share a head of keys and values."""
    assert key is not None
    return _heads(query) // _heads(key)


def _heads(value: ir.Value) -> int:
    return _size(value, 1)


def _size(value: ir.Value, axis: int) -> int:
    size = value.shape[axis] if value.shape is not None else None
    if not isinstance(size, int):
        raise BuildError(f"attention cannot be decomposed: dim {axis} of {value.name} is not known")
    return size


def _shape_constant(graph: ir.Graph, origin: ir.Node, part: str, sizes: list[int]) -> ir.Value:
    return _constant(graph, origin, part, np.array(sizes, np.int64))


def _node(origin: ir.Node, op: str, part: str, inputs: list[ir.Value | None], **attributes: int | list[int]) -> ir.Node:
    node = ir.node(op, inputs, attributes=attributes, name=f"{origin.name}/{part}")
    node.outputs[0].name = f"{origin.name}/{part}_output"
    return node


def _constant(graph: ir.Graph, origin: ir.Node, part: str, array: np.ndarray) -> ir.Value:
    name = f"{origin.name}/{part}"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
