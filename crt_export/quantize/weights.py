"""Find the MatMuls that multiply by a weight, and prove that a quantisation pass left none behind."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from crt_export.errors import BuildError, problem_list

_PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")


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
