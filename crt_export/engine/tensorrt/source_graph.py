"""The ONNX file that an engine is compiled from: what the engine is checked against."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from crt_export.errors import BuildError, problem_list
from crt_export.graph.contract import interface_of
from crt_export.spec import GraphSpec


@dataclass(frozen=True, kw_only=True)
class SourceGraph:
    """The parts of an ONNX graph that its engine must show again.

    Attributes:
        contract: Its inputs and outputs, and the caches that TensorScatter updates in place.
        linears: Names of the MatMul nodes whose right-hand side is a weight, quantised or not.
        products: Names of the other nodes that multiply matrices: attention, fused or decomposed.
    """

    contract: GraphSpec
    linears: tuple[str, ...]
    products: tuple[str, ...]


def source_graph_from_file(path: Path) -> SourceGraph:
    """Read an ONNX file (not its weights).

    Raises:
        BuildError: The file cannot be read, or holds what TensorRT would compile to something else without a
            word; lists every such node.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # onnx_ir passes on whatever protobuf and its own reader raise
        raise BuildError(f"{path} cannot be read as ONNX: {error}") from error
    graph = model.graph
    problems = _dialect_problems(graph)
    if problems:
        raise BuildError(problem_list(f"{path} is outside the dialect that TensorRT compiles correctly", problems))
    matmuls = [node for node in graph if node.op_type in ("MatMul", "Gemm")]
    linears = tuple(_name(node) for node in matmuls if _is_weight(node.inputs[1]))
    attention = [node for node in graph if node.op_type == "Attention"]
    return SourceGraph(
        contract=dataclasses.replace(interface_of(model), aliases=_updates(graph)),
        linears=linears,
        products=tuple(_name(node) for node in (*matmuls, *attention) if _name(node) not in linears),
    )


def _dialect_problems(graph: ir.Graph) -> list[str]:
    problems = []
    counts = Counter(node.name for node in graph if node.op_type in ("MatMul", "Gemm", "Attention"))
    problems += [
        f"matrix products need names of their own, {count} are called {name!r}"
        for name, count in counts.items()
        if count > 1 or not name
    ]
    for node in graph:
        if node.op_type == "Attention" and any(value is not None for value in node.inputs[4:]):
            problems.append(
                f"{node.name}: Attention takes query, key, value and mask only (the parser drops "
                "nonpad_kv_seqlen silently and refuses past_key)"
            )
        if node.op_type == "TensorScatter" and not (
            node.inputs[0] in graph.inputs and node.outputs[0] in graph.outputs
        ):
            problems.append(f"{node.name}: TensorScatter must go from a network input to a network output")
    return problems


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer, directly or behind DequantizeLinear."""
    if value is None:
        return False
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return _is_weight(producer.inputs[0])
    return value.is_initializer()


def _name(item: ir.Node | ir.Value | None) -> str:
    return (item.name if item is not None else None) or ""


def _updates(graph: ir.Graph) -> tuple[tuple[str, str], ...]:
    """Caches updated in place: output and input of every TensorScatter."""
    return tuple((_name(node.outputs[0]), _name(node.inputs[0])) for node in graph if node.op_type == "TensorScatter")
