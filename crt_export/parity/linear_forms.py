"""How the linears of a graph multiply: how often, by which tensors, in which form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from crt_export.config import ModelConfig
from crt_export.parity.graph_audit import FUSED, linear_of, live_nodes
from crt_export.quantize.linears import HEAD, expected_matmuls, linear_inputs, linear_names


def linear_problems(model: ir.Model, config: ModelConfig, graph: str, precision: str, unroll: int) -> Iterator[str]:
    """Linears that multiply more or less often than the passes ask for, or in another form than the precision's.

    Args:
        model: The file.
        config: The model.
        graph: ``step``, ``prefill``, ``prefill_pass`` or ``head``.
        precision: ``fp32``, ``fp16``, ``w8`` or ``w8a8``.
        unroll: Passes K of ``prefill``.
    """
    nodes = [(name, node) for node in live_nodes(model.graph) if (name := linear_of(node)) is not None]
    # Only w8 may multiply the linears of one activation at once; in other precisions the name is a foreign one.
    parts = {group.name: group.linears for group in linear_inputs(config) if precision == "w8"}
    products = [linear for name, _ in nodes for linear in parts.get(name, (name,))]
    passes = unroll if graph == "prefill" else 1
    expected = {name: 1 if name == HEAD else passes for name in linear_names(config) if graph != "head" or name == HEAD}
    found = Counter(products)
    inner = {found[name] for name in expected if name != HEAD}
    if len(inner) == 1 and inner != {passes}:
        yield f"{inner.pop()} passes are unrolled, expected {passes}"
    else:
        for name in sorted(expected.keys() | found.keys()):
            if found[name] != expected.get(name, 0):
                yield f"{name} multiplies {found[name]} times, expected {expected.get(name, 0)}"
    total = expected_matmuls(config, graph, unroll)
    if len(products) != total:
        yield f"{len(products)} products with a weight, expected {total} (linears x passes, and the head once)"
    groups = {linear: group.name for group in linear_inputs(config) for linear in group.linears}
    for name, node in nodes:
        problem = _form_problem(name, node, precision, groups.get(name, name))
        if problem:
            yield problem


def _form_problem(name: str, node: ir.Node, precision: str, group: str) -> str | None:
    label = f"{node.op_type} {node.name} of {name}"
    if precision == "w8":
        return _weight_only_problem(name, node, label)
    weight = node.inputs[1]
    quantised = weight is not None and not weight.is_initializer()
    if precision != "w8a8":
        return f"{label} is quantised in a {precision} graph" if quantised else None
    dequantise = weight.producer() if weight is not None else None
    if not quantised or dequantise is None:
        return f"{label} multiplies by a weight that is not INT8"
    names = [value.name if value is not None else None for value in dequantise.inputs]
    if names[:2] != [f"{name}.weight_q", f"{name}.weight_scale"] or len(names) > 2:
        return f"{label} dequantises its weight by {names}, expected {name}.weight_q and {name}.weight_scale"
    return _activation_problem(node, label, group)


def _weight_only_problem(name: str, node: ir.Node, label: str) -> str | None:
    if node.op_type != "MatMulNBits":
        return f"{label} multiplies in floating point, expected MatMulNBits"
    names = [value.name for value in node.inputs[1:] if value is not None]
    if names != [f"{name}.weight_blocks", f"{name}.weight_scales"]:
        return f"{label} reads {names}, expected {name}.weight_blocks and {name}.weight_scales"
    blocks = node.inputs[1].shape if node.inputs[1] is not None else None
    if blocks is None or len(blocks) != 3:
        return f"{label} has blocks of shape {blocks}, expected [out, blocks, block_size]"
    expected = {"bits": 8, "N": blocks[0], "block_size": blocks[2]}
    found = {key: node.attributes[key].as_int() for key in expected if key in node.attributes}
    if found != expected:
        return f"{label} has {found}, expected {expected}"
    return _split_problem(name, node, label) if name.rpartition(".")[2] == FUSED else None


def _split_problem(name: str, node: ir.Node, label: str) -> str | None:
    """Several linears at once are one product, one bias and one Split into as many equal parts, all of them used."""
    add = _only_user(node, "Add")
    split = _only_user(add, "Split") if add is not None else None
    if add is None or f"{name}.bias" not in {value.name for value in add.inputs if value is not None}:
        return f"{label} is not followed by an Add of {name}.bias"
    axis = split.attributes["axis"].as_int() if split is not None and "axis" in split.attributes else 0
    used = [bool(value.uses()) for value in split.outputs] if split is not None else []
    if axis not in (-1, 2) or used != [True] * len(FUSED) or len(split.inputs) != 1:  # type: ignore[union-attr]
        return f"{label} is not split into {len(FUSED)} equal parts along the last axis, all of them read"
    return None


def _only_user(node: ir.Node, operator: str) -> ir.Node | None:
    users = [user for user, _ in node.outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == operator else None


def _activation_problem(node: ir.Node, label: str, group: str) -> str | None:
    """An INT8 product also needs its left side through one and the same scale into INT8 and back."""
    dequantise = node.inputs[0].producer() if node.inputs[0] is not None else None
    quantise = None
    if dequantise is not None and dequantise.op_type == "DequantizeLinear" and dequantise.inputs[0] is not None:
        quantise = dequantise.inputs[0].producer()
    if dequantise is None or quantise is None or quantise.op_type != "QuantizeLinear":
        return f"{label} multiplies an activation that is not INT8"
    into, back = ([value.name if value else None for value in side.inputs[1:]] for side in (quantise, dequantise))
    if into != back or not into or into[0] != f"{group}.input_scale":
        return f"{label} quantises its activation by {into} and back by {back}, expected {group}.input_scale in both"
    return None
