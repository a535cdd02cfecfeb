"""The linears of a model: which read the same tensor, what produces it, and where a graph multiplies by them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from crt_export.config import ModelConfig
from crt_export.errors import BuildError, InputError, problem_list

HEAD = "lm_head"
_PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")


@dataclass(frozen=True, kw_only=True)
class LinearInput:
    """One activation that feeds one or more linears, quantised once for all of them.

    Attributes:
        name: Names the activation in statistics, plans and initializers.
        linears: Checkpoint names of the linears that read it.
        norm: LayerNorm that produces it, or None.
        producer: Linear whose output channels are its channels (v, read by o through attention), or None.
        after_gelu: It is the output of a GELU, hence one-sided.
    """

    name: str
    linears: tuple[str, ...]
    norm: str | None = None
    producer: str | None = None
    after_gelu: bool = False


def linear_inputs(config: ModelConfig) -> tuple[LinearInput, ...]:
    """Every activation that enters a linear, in the order of the data flow."""
    inputs = [*_feed_forward("correction", "correction.norm")] if config.recurrent else []
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        attn = f"{layer}.attn"
        inputs += [
            LinearInput(name=f"{attn}.qkv", linears=tuple(f"{attn}.{p}" for p in "qkv"), norm=f"{layer}.attn_norm"),
            LinearInput(name=f"{attn}.o", linears=(f"{attn}.o",), producer=f"{attn}.v"),
            *_feed_forward(f"{layer}.mlp", f"{layer}.mlp_norm"),
        ]
    return (*inputs, LinearInput(name=HEAD, linears=(HEAD,), norm="final_norm"))


def linear_names(config: ModelConfig) -> tuple[str, ...]:
    """Checkpoint names of all linears, the head last."""
    return tuple(name for group in linear_inputs(config) for name in group.linears)


def expected_matmuls(config: ModelConfig, graph: str, unroll: int = 1) -> int:
    """How many MatMuls with a weight a graph must hold, all of which a quantisation pass must replace.

    Args:
        config: Architecture.
        graph: ``step``, ``prefill``, ``prefill_pass`` or ``head``.
        unroll: Passes unrolled in the graph; every linear but the head occurs once per pass.

    Raises:
        InputError: Unknown graph name.
    """
    if graph not in ("step", "prefill", "prefill_pass", "head"):
        raise InputError(f"expected graph step, prefill, prefill_pass or head, found {graph!r}")
    if graph == "head":
        return 1
    passes = unroll if graph == "prefill" else 1
    return (len(linear_names(config)) - 1) * passes + 1


def _feed_forward(name: str, norm: str) -> Iterator[LinearInput]:
    yield LinearInput(name=f"{name}.up", linears=(f"{name}.up",), norm=norm)
    yield LinearInput(name=f"{name}.down", linears=(f"{name}.down",), after_gelu=True)


def weight_matmuls(graph: ir.Graph) -> list[tuple[str, ir.Node]]:
    """Every ``MatMul(x, <name>.weight)`` with a two-dimensional weight, as (name, node) in graph order."""
    found = []
    for node in graph:
        right = node.inputs[1] if node.op_type == "MatMul" else None
        name = (right.name or "") if right is not None else ""
        if name.endswith(".weight") and right is not None and _is_initializer_matrix(right):
            found.append((name.removesuffix(".weight"), node))
    return found


def require_none_left(graph: ir.Graph, linears: Collection[str]) -> None:
    """Check that no linear still multiplies in floating point.

    Raises:
        BuildError: With every weight that is still used, and every product with a constant of any name.
    """
    problems = []
    for name in linears:
        value = graph.initializers.get(f"{name}.weight")
        for node, _ in value.uses() if value is not None else ():
            problems.append(f"{name}.weight is read by {node.op_type} {node.name}")
    for node in graph:
        if node.op_type in _PRODUCTS and any(_is_matrix(value) for value in node.inputs):
            problems.append(f"{node.op_type} {node.name} multiplies by a constant matrix")
    if problems:
        raise BuildError(problem_list(f"graph {graph.name}: linears that were not quantised", sorted(set(problems))))


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """The initializer of that name, made from ``array`` unless the graph already has it."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        graph.register_initializer(ir.val(name, const_value=tensor))
    return graph.initializers[name]


def _is_matrix(value: ir.Value | None) -> bool:
    """A constant of two dimensions, directly or behind a Transpose, Cast, Reshape or Identity."""
    while value is not None:
        producer = value.producer()
        if producer is None:
            return _is_initializer_matrix(value)
        if producer.op_type not in ("Transpose", "Cast", "Reshape", "Identity"):
            return False
        value = producer.inputs[0]
    return False


def _is_initializer_matrix(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and len(value.const_value.shape) == 2
