"""Pass: the last pass of an unrolled graph looks up its rotary angles on its own.

All K passes rotate by the same angles, so the graph looks them up once. TensorRT-RTX 1.7.1 fuses that look-up with
the cache update of the last pass and, from two layers on, with work of an earlier pass: a cycle. Its builder then
fails ("After KGEN: there are uses before defs") or crashes. Two equal look-ups would be merged again by the builder,
so the second goes through a Min with the last row of the table, which no valid position exceeds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from crt_export.errors import BuildError

_TABLES = re.compile(r"rope_(cos|sin)(_[0-9]+)?")
#: What may lie between a look-up and its use: operators that only change the shape or type of their first input.
FORMATTING = frozenset({"Unsqueeze", "Squeeze", "Reshape", "Cast", "Slice", "Expand", "Identity"})


def separate_rotation(graph: ir.Model) -> int:
    """Give the nodes of the last pass a rotary look-up of their own.

    Requires: rotary tables are initializers ``rope_cos``, ``rope_sin`` and so on, looked up by Gather; the last pass is
        the one that updates the cache.
    Ensures: no look-up serves both the last pass and an earlier one. A graph with one pass, or without rotation, is
        unchanged.

    Returns:
        The number of uses that were moved to a look-up of their own; 0 with one pass.

    Raises:
        BuildError: It has tables and no look-up, or no cache update.
    """
    body = graph.graph
    lookups = _lookups(body)
    if not lookups:
        if not _tables(body):
            return 0
        raise BuildError(f"graph {body.name}: no Gather from a rotary table, so there is no rotation to separate")
    earlier = _earlier_passes(body)
    moves = [use for lookup in lookups for use in _uses(lookup)]
    if not any(user in earlier for user, _ in moves):
        return 0
    moves = [(user, slot) for user, slot in moves if user not in earlier]
    copies: dict[ir.Value, ir.Value] = {}
    for user, slot in moves:
        value = user.inputs[slot]
        assert value is not None
        user.replace_input_with(slot, _copy(body, value, copies))
    body.sort()
    for lookup in _lookups(body):
        if len({user in earlier for user, _ in _uses(lookup)}) > 1:
            raise BuildError(f"graph {body.name}: look-up {lookup.name} still serves the last pass and earlier ones")
    return len(moves)


def _tables(graph: ir.Graph) -> list[ir.Value]:
    return [value for name, value in graph.initializers.items() if _TABLES.fullmatch(name)]


def _lookups(graph: ir.Graph) -> list[ir.Node]:
    return [user for table in _tables(graph) for user, _ in table.uses() if user.op_type == "Gather"]


def _uses(lookup: ir.Node) -> Iterator[tuple[ir.Node, int]]:
    """The (node, input) pairs that compute with a look-up, behind all formatting."""
    for user, slot in lookup.outputs[0].uses():
        if user.op_type in FORMATTING and slot == 0:
            yield from _uses(user)
        else:
            yield user, slot


def _earlier_passes(graph: ir.Graph) -> set[ir.Node]:
    """Everything that happens before the last pass: whatever its first projection to keys or values depends on."""
    updates = [node for node in graph if node.op_type == "TensorScatter"]
    if not updates:
        raise BuildError(f"graph {graph.name}: no TensorScatter, so the last pass cannot be told from earlier ones")
    projections = [node for node in _ancestors([updates[0]]) if _multiplies_weight(node)]
    last = max(projections, key=list(graph).index)
    return _ancestors([last])


def _multiplies_weight(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and not _depends_on_input(node.inputs[1])


def _depends_on_input(value: ir.Value | None) -> bool:
    if value is None or value.is_initializer():
        return False
    producer = value.producer()
    return producer is None or any(_depends_on_input(source) for source in producer.inputs)


def _ancestors(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """All nodes that the given ones depend on, without these."""
    found: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        for value in waiting.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer not in found:
                found.add(producer)
                waiting.append(producer)
    return found


def _copy(graph: ir.Graph, value: ir.Value, copies: dict[ir.Value, ir.Value]) -> ir.Value:
    """Copy the chain from a table's Gather to ``value``, each node once."""
    if value in copies:
        return copies[value]
    origin = value.producer()
    assert origin is not None
    if origin.op_type == "Gather":
        inputs = [origin.inputs[0], _bounded(graph, origin, copies)]
    else:
        assert origin.inputs[0] is not None
        inputs = [_copy(graph, origin.inputs[0], copies), *origin.inputs[1:]]
    clone = ir.node(origin.op_type, inputs, attributes=dict(origin.attributes), name=f"{origin.name}/last_pass")
    copies[value] = _described(clone, value)
    graph.append(clone)
    return copies[value]


def _bounded(graph: ir.Graph, lookup: ir.Node, copies: dict[ir.Value, ir.Value]) -> ir.Value:
    """Return Min(index, last row of the table) for the index of a look-up."""
    table, index = lookup.inputs
    assert table is not None
    assert index is not None
    rows = table.shape[0] if table.shape is not None else None
    if not isinstance(rows, int):
        raise BuildError(f"graph {graph.name}: the number of rows of {table.name} is unknown")
    if index not in copies:
        name = f"{lookup.name}/last_row"
        tensor = ir.tensor(np.array(rows - 1, np.int64), name=name)
        row = ir.Value(name=name, const_value=tensor, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(row)
        bound = ir.node("Min", [index, row], name=f"{lookup.name}/bounded")
        copies[index] = _described(bound, index)
        graph.append(bound)
    return copies[index]


def _described(node: ir.Node, like: ir.Value) -> ir.Value:
    """Name the output of a copied node, and give it the shape and type of the original."""
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{node.name}_output", like.shape, like.type
    return output
