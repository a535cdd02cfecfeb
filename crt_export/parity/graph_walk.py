"""From a value in a graph back to what it is made of."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from crt_export.graph.passes.separate_rotation import FORMATTING

#: Deliver the size of their input, not its values.
SIZES = frozenset({"Shape", "Size"})
#: The last name of a product of several linears at once is made of theirs, in the order of its parts.
FUSED = "qkv"


def live_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that some output depends on, in graph order."""
    live = _ancestors(value for value in graph.outputs)
    return [node for node in graph if node in live]


def linear_of(node: ir.Node) -> str | None:
    """Checkpoint name of the linear that a node multiplies by, the name of a foreign constant, None for no constant."""
    if node.op_type == "MatMulNBits":
        return _stem(node.inputs[1], ".weight_blocks")
    if node.op_type not in ("MatMul", "Gemm", "MatMulInteger"):
        return None
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        value = producer.inputs[0]
        return _stem(value, ".weight_q") if value is not None and value.is_initializer() else None
    return _stem(value, ".weight") if value is not None and value.is_initializer() else None


def nearest_linears(value: ir.Value | None) -> set[str]:
    """The linears whose result a value is made of, without those further back.

    Of a product of several linears at once, only the one whose part of a Split the value is made of.
    """
    found: set[str] = set()
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        node = current.producer() if current is not None else None
        if current is None or node is None or current in seen or node.op_type in SIZES:
            continue
        seen.add(current)
        name = linear_of(node)
        if name is not None:
            found.add(name)
        elif node.op_type == "Split":
            part = node.outputs.index(current)
            found.update(_part_of(linear, part) for linear in nearest_linears(node.inputs[0]))
        else:
            waiting.extend(node.inputs)
    return found


def _part_of(linear: str, part: int) -> str:
    stem, _, name = linear.rpartition(".")
    return f"{stem}.{FUSED[part]}" if name == FUSED and part < len(FUSED) else linear


def looked_up(value: ir.Value) -> str:
    """Name of the table that a value holds rows of, behind nodes that only change a shape or a type."""
    node = value.producer()
    while node is not None and node.op_type in FORMATTING and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    if node is None or node.op_type != "Gather" or node.inputs[0] is None:
        return f"no table but {node.op_type if node is not None else value.name}"
    return str(node.inputs[0].name)


def _ancestors(values: Iterable[ir.Value | None]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(node.inputs)
    return found


def _stem(value: ir.Value | None, suffix: str) -> str:
    return ((value.name if value is not None else None) or "(unnamed)").removesuffix(suffix)
