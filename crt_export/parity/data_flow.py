"""What a graph does with its tensors: which inputs it reads, by what it rotates, which caches it updates."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from crt_export.parity.graph_walk import SIZES, live_nodes, looked_up, nearest_linears
from crt_export.spec import GraphSpec

_PROJECTIONS = {"key": "k", "value": "v"}
#: Inputs of RotaryEmbedding after the first. Without position ids the angles are one row per token.
_ANGLES = ("rope_cos", "rope_sin")


def flow_problems(model: ir.Model) -> Iterator[str]:
    """Inputs whose values no output depends on, outputs that no node computes, rotations by foreign angles."""
    graph = model.graph
    read = {value for node in live_nodes(graph) if node.op_type not in SIZES for value in node.inputs}
    for value in graph.inputs:
        if value not in read:
            dead = any(node.op_type not in SIZES for node, _ in value.uses())
            how = "only by nodes that no output depends on" if dead else "by no node"
            yield f"input {value.name} is read {how}"
        if value.is_initializer():
            yield f"input {value.name} has a default value in the file: what the caller forgets would go unnoticed"
    for value in graph.outputs:
        if value.producer() is None:
            kind = "an input" if value.is_graph_input() else "a constant"
            yield f"output {value.name} is computed by no node: it is {kind}"
    for node in graph:
        if node.op_type == "RotaryEmbedding":
            found = [looked_up(value) for value in node.inputs[1:] if value is not None]
            if found != [*_ANGLES]:
                due = ", ".join(_ANGLES)
                yield f"RotaryEmbedding {node.name} rotates by rows of {', '.join(found)}, expected {due}"


def cache_problems(model: ir.Model, spec: GraphSpec) -> Iterator[str]:
    """Caches that are not one in-place update of their own past by their own layer's projection."""
    outputs = {value.name: value for value in model.graph.outputs}
    for present, past in spec.aliases:
        if present not in outputs:
            continue  # the interface says so
        source, updates = _cache_update(outputs[present])
        if source is None or source.name != past:
            found = f"continues {source.name}" if source is not None else "continues no input"
            yield f"output {present} {found}, expected {past}: caches are swapped or rerouted"
        if len(updates) != 1:
            yield f"output {present} is written by {len(updates)} TensorScatter nodes, expected 1"
        for node in updates:
            layer, kind = present.split(".")[1:]
            expected = f"layers.{layer}.attn.{_PROJECTIONS[kind]}"
            found = sorted(nearest_linears(node.inputs[1]))
            if found != [expected]:
                yield f"output {present} stores what {', '.join(found) or 'no linear'} computes, expected {expected}"
            mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "linear"
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -2
            if (mode, axis) not in (("linear", -2), ("linear", 2)):
                yield f"output {present}: TensorScatter has mode {mode!r} and axis {axis}, expected 'linear' and -2"


def _cache_update(present: ir.Value) -> tuple[ir.Value | None, list[ir.Node]]:
    """The graph input that a cache output continues, and the nodes that write into it on the way."""
    updates: list[ir.Node] = []
    value: ir.Value | None = present
    while value is not None:
        node = value.producer()
        if node is None:
            return (value if value.is_graph_input() else None), updates
        if node.op_type == "TensorScatter":
            updates.append(node)
        elif node.op_type != "Identity":
            return None, updates
        value = node.inputs[0]
    return None, updates
