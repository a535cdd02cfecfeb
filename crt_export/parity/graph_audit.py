"""Audit of what the nodes of a graph do: inputs read, rotations, caches updated, linears multiplied, attributes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir
from torch.nn import functional as F

from crt_export.config import ModelConfig
from crt_export.graph.passes.separate_rotation import FORMATTING
from crt_export.models.declaration import INTERLEAVED
from crt_export.models.layers import LayerNorm, RmsNorm, gelu_tanh
from crt_export.models.registry import linears_of_caches, meta_model, tensor_shapes
from crt_export.quantize.linears import HEAD, expected_matmuls, linear_inputs
from crt_export.quantize.w8 import FUSED, name_of_widths
from crt_export.spec import GraphSpec

#: Deliver the size of their input, not its values.
_SIZES = frozenset({"Shape", "Size"})
#: Inputs of RotaryEmbedding after the first. Without position ids the angles are one row per token.
_ANGLES = re.compile(r"rope_cos(_[0-9]+)?, rope_sin(_[0-9]+)?")
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
            match = _ANGLES.fullmatch(", ".join(found))
            if match is None or match[1] != match[2]:
                tables = "rope_cos, rope_sin"
                yield f"RotaryEmbedding {node.name} rotates by rows of {', '.join(found)}, expected {tables}"


def cache_problems(model: ir.Model, spec: GraphSpec, config: ModelConfig) -> Iterator[str]:
    """Caches that are not one in-place update of their own past by their own projection."""
    linears = linears_of_caches(config)
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
            index, kind = present.split(".")[1:]
            expected = linears[int(index)][kind == "value"]
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
    """Scale of attention, epsilon of a norm, form of GELU, pairs of a rotation that are none of the model's.

    One sentence per kind. An attribute that is absent has the default of ONNX. Attention that was decomposed for a
    compiler holds its scale elsewhere; the one-step level judges it.
    """
    for operator, attributes in _expected_attributes(config).items():
        nodes = [node for node in model.graph.all_nodes() if node.op_type == operator]
        for name, (wanted, default) in attributes.items():
            found = [(node, node.attributes[name].value if name in node.attributes else default) for node in nodes]
            wrong = [(node, value) for node, value in found if not any(_equal(value, one) for one in wanted)]
            if wrong:
                node, value = wrong[0]
                absent = "" if name in node.attributes else " by default"
                yield (
                    f"{name} of {operator} is {_text(value)}{absent} in {len(wrong)} nodes "
                    f"({node.name or '(unnamed)'}), expected {' or '.join(map(_text, wanted)) or 'none such'}"
                )


def _expected_attributes(config: ModelConfig) -> dict[str, dict[str, tuple[list[float | str], float | str]]]:
    """Per operator and attribute the values that a model has, and what an absent attribute means.

    Attention-23 and -24, LayerNormalization-17, RMSNormalization-23, Gelu-20, RotaryEmbedding-23.
    """
    scales: list[float | str] = sorted({cache.head_dim**-0.5 for cache in config.carried.caches})
    pairs: list[float | str] = sorted(
        {int(cache.rotary.layout == INTERLEAVED) for cache in config.carried.caches if cache.rotary is not None}
    )
    modules = [*meta_model(config).modules()]
    epsilons: list[float | str] = sorted({one.eps for one in modules if isinstance(one, LayerNorm | RmsNorm)})
    activations = {getattr(one, "activation", None) for one in modules}
    forms: list[float | str] = [name for name, form in (("none", F.gelu), ("tanh", gelu_tanh)) if form in activations]
    norm: dict[str, tuple[list[float | str], float | str]] = {"epsilon": (epsilons, 1e-5), "axis": ([-1], -1)}
    return {
        "Attention": {"scale": (scales, scales[0]), "softcap": ([0.0], 0.0), "is_causal": ([0], 0)},
        "LayerNormalization": norm,
        "RMSNormalization": norm,
        "Gelu": {"approximate": (forms, "none")},
        "RotaryEmbedding": {"interleaved": (pairs, 0), "rotary_embedding_dim": ([0], 0), "num_heads": ([0], 0)},
    }


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
    calls = {name: group.calls for group in linear_inputs(config) for name in group.linears}
    wanted = {name: 1 if name == HEAD else passes * count for name, count in calls.items()}
    expected = {name: count for name, count in wanted.items() if graph != "head" or name == HEAD}
    found = Counter(products)
    inner = {found[name] / calls[name] for name in expected if name != HEAD}
    if len(inner) == 1 and inner != {passes}:
        yield f"{inner.pop():g} passes are unrolled, expected {passes}"
    else:
        for name in sorted(expected.keys() | found.keys()):
            if found[name] != expected.get(name, 0):
                yield f"{name} multiplies {found[name]} times, expected {expected.get(name, 0)}"
    total = expected_matmuls(config, graph, unroll)
    if len(products) != total:
        yield f"{len(products)} products with a weight, expected {total} (linears x passes, and the head once)"
    groups = {linear: group.name for group in linear_inputs(config) for linear in group.linears}
    biases = frozenset(tensor_shapes(config))
    for name, node in nodes:
        problem = _product_problem(name, node, precision, groups.get(name, name), biases)
        if problem:
            yield problem


def _product_problem(name: str, node: ir.Node, precision: str, group: str, biases: frozenset[str]) -> str | None:
    label = f"{node.op_type} {node.name} of {name}"
    if precision == "w8":
        return _weight_only_problem(name, node, label, biases)
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


def _weight_only_problem(name: str, node: ir.Node, label: str, biases: frozenset[str]) -> str | None:
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
    stem, _, last = name.rpartition(".")
    return (
        _split_problem(name, node, label, [f"{stem}.{part}" for part in FUSED[last]], biases) if last in FUSED else None
    )


def _split_problem(name: str, node: ir.Node, label: str, parts: list[str], biases: frozenset[str]) -> str | None:
    """Several linears at once are one product, one bias if they have any, and one Split, all parts of it used."""
    add = _only_user(node, "Add")
    biased = add is not None and f"{name}.bias" in {value.name for value in add.inputs if value is not None}
    if f"{parts[0]}.bias" in biases and not biased:
        return f"{label} is not followed by an Add of {name}.bias"
    split = _only_user(add if add is not None and biased else node, "Split")
    axis = split.attributes["axis"].as_int() if split is not None and "axis" in split.attributes else 0
    used = [bool(value.uses()) for value in split.outputs] if split is not None else []
    widths = [value.name for value in split.inputs[1:] if value is not None] if split is not None else []
    if axis not in (-1, 2) or used != [True] * len(parts) or widths not in ([], [name_of_widths(name)]):
        return f"{label} is not split into {len(parts)} parts along the last axis, all of them read"
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
    parts = FUSED.get(name, ())
    return f"{stem}.{parts[part]}" if part < len(parts) else linear


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
