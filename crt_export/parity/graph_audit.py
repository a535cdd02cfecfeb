"""Audit of what the nodes of a graph do: inputs read, rotations, caches updated, linears multiplied, attributes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from crt_export.config import ModelConfig
from crt_export.graph.passes.separate_rotation import FORMATTING
from crt_export.quantize.linears import HEAD, expected_matmuls, linear_inputs, linear_names
from crt_export.spec import GraphSpec

#: Deliver the size of their input, not its values.
_SIZES = frozenset({"Shape", "Size"})
#: The last name of a product of several linears at once is made of theirs, in the order of its parts.
_FUSED = "qkv"
_PROJECTIONS = {"key": "k", "value": "v"}
#: Inputs of RotaryEmbedding after the first. Without position ids the angles are one row per token.
_ANGLES = ("rope_cos", "rope_sin")
#: Attributes are float32; a number of the configuration is a float64.
_RELATIVE = 1e-6


def flow_problems(model: ir.Model) -> Iterator[str]:
    """Inputs whose values no output depends on, outputs that no node computes, rotations by foreign angles."""
    graph = model.graph
    read = {value for node in _live_nodes(graph) if node.op_type not in _SIZES for value in node.inputs}
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
                expected = ", ".join(_ANGLES)
                yield f"RotaryEmbedding {node.name} rotates by rows of {', '.join(found)}, expected {expected}"


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


def attribute_problems(model: ir.Model, config: ModelConfig) -> Iterator[str]:
    """Scale of attention, epsilon of LayerNorm, form of GELU, pairs of a rotation that are not the model's.

    One sentence per kind. An attribute that is absent has the default of ONNX. Attention that was decomposed for a
    compiler holds its scale elsewhere; the one-step level judges it.
    """
    scale = config.head_dim**-0.5
    # Wanted, and what an absent attribute means (Attention-23 and -24, LayerNormalization-17, Gelu-20,
    # RotaryEmbedding-23).
    expected: dict[str, dict[str, tuple[float | str, float | str]]] = {
        "Attention": {"scale": (scale, scale), "softcap": (0.0, 0.0), "is_causal": (0, 0)},
        "LayerNormalization": {"epsilon": (config.layer_norm_eps, 1e-5), "axis": (-1, -1)},
        "Gelu": {"approximate": ("none", "none")},
        "RotaryEmbedding": {
            "interleaved": (int(config.rope_layout == "interleaved"), 0),
            "rotary_embedding_dim": (0, 0),
            "num_heads": (0, 0),
        },
    }
    for operator, attributes in expected.items():
        nodes = [node for node in model.graph.all_nodes() if node.op_type == operator]
        for name, (wanted, default) in attributes.items():
            found = [(node, node.attributes[name].value if name in node.attributes else default) for node in nodes]
            wrong = [(node, value) for node, value in found if not _equal(value, wanted)]
            if wrong:
                node, value = wrong[0]
                absent = "" if name in node.attributes else " by default"
                yield (
                    f"{name} of {operator} is {_text(value)}{absent} in {len(wrong)} nodes "
                    f"({node.name or '(unnamed)'}), expected {_text(wanted)}"
                )


def _equal(value: object, wanted: float | str) -> bool:
    if isinstance(wanted, str) or not isinstance(value, int | float):
        return value == wanted
    return math.isclose(value, wanted, rel_tol=_RELATIVE)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- linears
def linear_problems(model: ir.Model, config: ModelConfig, graph: str, precision: str, unroll: int) -> Iterator[str]:
    """Linears that multiply more or less often than the passes ask for, or in other arithmetic than the precision's.

    Args:
        model: The file.
        config: The model.
        graph: ``step``, ``prefill``, ``prefill_pass`` or ``head``.
        precision: ``fp32``, ``fp16``, ``w8`` or ``w8a8``.
        unroll: Passes K of ``prefill``.
    """
    nodes = [(name, node) for node in _live_nodes(model.graph) if (name := _linear_of(node)) is not None]
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
        problem = _product_problem(name, node, precision, groups.get(name, name))
        if problem:
            yield problem


def _product_problem(name: str, node: ir.Node, precision: str, group: str) -> str | None:
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
    return _split_problem(name, node, label) if name.rpartition(".")[2] == _FUSED else None


def _split_problem(name: str, node: ir.Node, label: str) -> str | None:
    """Several linears at once are one product, one bias and one Split into as many equal parts, all of them used."""
    add = _only_user(node, "Add")
    split = _only_user(add, "Split") if add is not None else None
    if add is None or f"{name}.bias" not in {value.name for value in add.inputs if value is not None}:
        return f"{label} is not followed by an Add of {name}.bias"
    axis = split.attributes["axis"].as_int() if split is not None and "axis" in split.attributes else 0
    used = [bool(value.uses()) for value in split.outputs] if split is not None else []
    if axis not in (-1, 2) or used != [True] * len(_FUSED) or len(split.inputs) != 1:  # type: ignore[union-attr]
        return f"{label} is not split into {len(_FUSED)} equal parts along the last axis, all of them read"
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


# --- what a value is made of
def _live_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that some output depends on, in graph order."""
    live: set[ir.Node] = set()
    waiting: list[ir.Value | None] = list(graph.outputs)
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is not None and node not in live:
            live.add(node)
            waiting.extend(node.inputs)
    return [node for node in graph if node in live]


def _linear_of(node: ir.Node) -> str | None:
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


def _nearest_linears(value: ir.Value | None) -> set[str]:
    """The linears whose result a value is made of, without those further back.

    Of a product of several linears at once, only the one whose part of a Split the value is made of.
    """
    found: set[str] = set()
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        node = current.producer() if current is not None else None
        if current is None or node is None or current in seen or node.op_type in _SIZES:
            continue
        seen.add(current)
        name = _linear_of(node)
        if name is not None:
            found.add(name)
        elif node.op_type == "Split":
            part = node.outputs.index(current)
            found.update(_part_of(linear, part) for linear in _nearest_linears(node.inputs[0]))
        else:
            waiting.extend(node.inputs)
    return found


def _part_of(linear: str, part: int) -> str:
    stem, _, name = linear.rpartition(".")
    return f"{stem}.{_FUSED[part]}" if name == _FUSED and part < len(_FUSED) else linear


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
