"""What a graph does with its tensors: which inputs it reads, which caches it updates, how often a linear multiplies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from crt_export.config import ModelConfig
from crt_export.graph.passes.separate_rotation import FORMATTING
from crt_export.quantize.linears import HEAD, expected_matmuls, linear_inputs, linear_names
from crt_export.spec import GraphSpec

#: Delivers the size of its input, not its values.
_SIZES = frozenset({"Shape", "Size"})
_PROJECTIONS = {"key": "k", "value": "v"}
#: Inputs of RotaryEmbedding after the first. Without position ids the angles are one row per token.
_ANGLES = ("rope_cos", "rope_sin")


def flow_problems(model: ir.Model) -> Iterator[str]:
    """Inputs whose values no output depends on, and outputs that no node computes."""
    graph = model.graph
    read = {value for node in live_nodes(graph) if node.op_type not in _SIZES for value in node.inputs}
    for value in graph.inputs:
        if value not in read:
            dead = any(node.op_type not in _SIZES for node, _ in value.uses())
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
            found = [_looked_up(value) for value in node.inputs[1:] if value is not None]
            if found != [*_ANGLES]:
                due = ", ".join(_ANGLES)
                yield f"RotaryEmbedding {node.name} rotates by rows of {', '.join(found)}, expected {due}"


def live_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that some output depends on, in graph order."""
    live = _ancestors(value for value in graph.outputs)
    return [node for node in graph if node in live]


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
            found = sorted(_nearest_linears(node.inputs[1]))
            if found != [expected]:
                yield f"output {present} stores what {', '.join(found) or 'no linear'} computes, expected {expected}"
            mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "linear"
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -2
            if (mode, axis) not in (("linear", -2), ("linear", 2)):
                yield f"output {present}: TensorScatter has mode {mode!r} and axis {axis}, expected 'linear' and -2"


def linear_problems(model: ir.Model, config: ModelConfig, graph: str, precision: str, unroll: int) -> Iterator[str]:
    """Linears that multiply more or less often than the passes ask for, or in another form than the precision's.

    Args:
        model: The file.
        config: The model.
        graph: ``step``, ``prefill``, ``prefill_pass`` or ``head``.
        precision: ``fp32``, ``fp16``, ``w8`` or ``w8a8``.
        unroll: Passes K of ``prefill``.
    """
    products = [(name, node) for node in live_nodes(model.graph) if (name := linear_of(node)) is not None]
    passes = unroll if graph == "prefill" else 1
    expected = {name: 1 if name == HEAD else passes for name in linear_names(config) if graph != "head" or name == HEAD}
    found = Counter(name for name, _ in products)
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
    for name, node in products:
        problem = _form_problem(name, node, precision, groups.get(name, name))
        if problem:
            yield problem


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
    return None if found == expected else f"{label} has {found}, expected {expected}"


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


def _nearest_linears(value: ir.Value | None) -> set[str]:
    """The linears whose result a value is made of, without those further back."""
    found: set[str] = set()
    seen: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        node = current.producer() if current is not None else None
        if node is None or node in seen or node.op_type in _SIZES:
            continue
        seen.add(node)
        name = linear_of(node)
        if name is None:
            waiting.extend(node.inputs)
        else:
            found.add(name)
    return found


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


def _looked_up(value: ir.Value) -> str:
    """Name of the table that a value holds rows of, behind nodes that only change a shape or a type."""
    node = value.producer()
    while node is not None and node.op_type in FORMATTING and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    if node is None or node.op_type != "Gather" or node.inputs[0] is None:
        return f"no table but {node.op_type if node is not None else value.name}"
    return str(node.inputs[0].name)


def _stem(value: ir.Value | None, suffix: str) -> str:
    return ((value.name if value is not None else None) or "(unnamed)").removesuffix(suffix)
