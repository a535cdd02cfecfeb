"""Check an ONNX graph against the contract of ``graphs/*.toml`` and the operators our runtimes accept."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from crt_export.errors import ContractError, problem_list
from crt_export.spec import GraphSpec, TensorSpec

_OPERATORS = """
    Abs Add And ArgMax Attention Cast Clip Concat DequantizeLinear Equal Expand Gather GatherElements Gelu Identity
    IsNaN LayerNormalization Less LessOrEqual MatMul MatMulNBits Max Min Mul Neg QuantizeLinear Range ReduceMax
    ReduceSum Reshape RotaryEmbedding Shape Slice Softmax Split Squeeze Sub TensorScatter Transpose Unsqueeze Where
"""
#: Operators every target was seen to parse and run; anything else must be a decision, not an accident of the exporter.
OPERATORS = frozenset(_OPERATORS.split())
_DTYPES = {"int64": ir.DataType.INT64, "float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def check_contract(graph: ir.Model, spec: GraphSpec) -> None:
    """Compare inputs, outputs, dtypes, dims, operators and cache aliases.

    Raises:
        ContractError: With every difference.
    """
    problems = [
        *interface_problems(graph, spec),
        *_operator_problems(graph),
        *_alias_problems(graph, spec),
        *_weight_problems(graph),
    ]
    if problems:
        raise ContractError(problem_list(f"graph {spec.name} breaks its contract graphs/{spec.name}.toml", problems))


def interface_problems(graph: ir.Model, spec: GraphSpec) -> Iterator[str]:
    """Every difference in names, order, dtypes and dims of inputs and outputs, one sentence each."""
    yield from _tensor_problems("input", graph.graph.inputs, spec.inputs)
    yield from _tensor_problems("output", graph.graph.outputs, spec.outputs)


def _tensor_problems(kind: str, values, tensors: tuple[TensorSpec, ...]) -> Iterator[str]:
    found = {value.name: value for value in values}
    if list(found) != [tensor.name for tensor in tensors]:
        missing = [tensor.name for tensor in tensors if tensor.name not in found]
        extra = [name for name in found if name not in {tensor.name for tensor in tensors}]
        yield f"{kind}s differ: missing {missing}, unexpected {extra}, found in order {list(found)}"
    for tensor in tensors:
        value = found.get(tensor.name)
        if value is None:
            continue
        dims = None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
        if value.dtype != _DTYPES[tensor.dtype] or dims != tensor.dims:
            yield f"{kind} {tensor}: found {value.dtype} {list(dims) if dims is not None else 'without a shape'}"


def _operator_problems(graph: ir.Model) -> Iterator[str]:
    unknown = {node.op_type for node in graph.graph.all_nodes()} - OPERATORS
    if unknown:
        yield f"operators no target was checked with: {', '.join(sorted(unknown))}"
    if any(len(node.outputs) > 1 for node in graph.graph if node.op_type == "Attention"):
        yield "Attention with more than one output (TensorRT rejects past and present)"


def _alias_problems(graph: ir.Model, spec: GraphSpec) -> Iterator[str]:
    outputs = {value.name: value for value in graph.graph.outputs}
    for present, past in spec.aliases:
        node = outputs[present].producer() if present in outputs else None
        source = node.inputs[0] if node is not None and node.op_type == "TensorScatter" else None
        if source is None or source.name != past:
            yield f"output {present} is not a TensorScatter into input {past}"


def _weight_problems(graph: ir.Model) -> Iterator[str]:
    for node in graph.graph.all_nodes():
        weights = [
            v.name
            for v in node.inputs
            if v is not None and v.is_initializer() and v.name and v.name.endswith(".weight")
        ]
        if weights and node.op_type == "Transpose":
            yield f"weight {weights[0]} is transposed in the graph: quantisers would skip it"
