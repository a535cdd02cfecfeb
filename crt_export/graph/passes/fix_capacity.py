"""Pass: the cache length becomes a number, as TensorRT's in-place cache update needs it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir

from crt_export.errors import BuildError, problem_list

_CAPACITY = re.compile(r"\bcapacity\b")


def fix_capacity(graph: ir.Model, capacity: int) -> None:
    """Set the symbolic dim ``capacity`` to a number in every input, output and intermediate value.

    What the graph computes from the dim (Shape, Range) stays as it is: runtimes fold it.

    Requires: an input has the dim ``capacity``; the number is at least 1.
    Ensures: no value has a dim that depends on ``capacity``.

    Raises:
        BuildError: The graph has no such dim, or the number is impossible.
    """
    label = f"graph {graph.graph.name}"
    if capacity < 1:
        raise BuildError(f"{label}: capacity must be at least 1 token, not {capacity}")
    if not any(_symbols(value) for value in graph.graph.inputs):
        raise BuildError(f"{label}: no input has the dim capacity, so there is nothing to fix")
    for value in _values(graph):
        if _symbols(value) and value.shape is not None:
            value.shape = ir.Shape([_fixed(dim, capacity) for dim in value.shape])
    left = [f"{value.name} {value.shape}" for value in _values(graph) if _symbols(value)]
    if left:
        raise BuildError(problem_list(f"{label}: dims still depend on capacity", left))


def _values(graph: ir.Model) -> Iterator[ir.Value]:
    """Inputs and everything that a node computes, the outputs included."""
    yield from graph.graph.inputs
    for node in graph.graph.all_nodes():
        yield from node.outputs


def _symbols(value: ir.Value) -> list[str]:
    """The dims of a value that depend on the capacity."""
    dims = value.shape or ()
    return [str(d.value) for d in dims if not isinstance(d, int) and _CAPACITY.search(str(d.value))]


def _fixed(dim: int | ir.SymbolicDim, capacity: int) -> int | ir.SymbolicDim:
    """``capacity`` is a number now; of an expression such as ``seq + capacity`` only the size is forgotten."""
    if isinstance(dim, int) or not _CAPACITY.search(str(dim.value)):
        return dim
    return capacity if dim.value == "capacity" else ir.SymbolicDim(None)
