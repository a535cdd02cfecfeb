"""Audit of what the nodes of a graph do: inputs read, rotations, caches updated, numbers in their attributes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

import onnx_ir as ir
from torch.nn import functional as F

from crt_export.config import ModelConfig
from crt_export.graph.passes.separate_rotation import FORMATTING
from crt_export.models.declaration import INTERLEAVED
from crt_export.models.layers import LayerNorm, RmsNorm, gelu_tanh
from crt_export.models.registry import linears_of_caches, meta_model
from crt_export.quantize.w8 import FUSED
from crt_export.spec import GraphSpec

#: Deliver the size of their input, not its values.
SIZES = frozenset({"Shape", "Size"})
#: Inputs of RotaryEmbedding after the first. Without position ids the angles are one row per token.
_ANGLES = re.compile(r"rope_cos(_[0-9]+)?, rope_sin(_[0-9]+)?")
#: Attributes are float32; a number of the configuration is a float64.
_RELATIVE = 1e-6


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
    norm = {"epsilon": (epsilons, 1e-5), "axis": ([-1], -1)}
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
    parts = FUSED.get(name, ())
    return f"{stem}.{parts[part]}" if part < len(parts) else linear


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
