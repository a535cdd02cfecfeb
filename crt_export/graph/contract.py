"""Check an ONNX graph against the contract of ``graphs/*.toml`` and the operators our runtimes accept."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from crt_export.errors import ContractError, problem_list
from crt_export.spec import GraphSpec, TensorSpec, interface_problems

_OPERATORS = """
    Abs Add And ArgMax Attention Cast Clip Concat DequantizeLinear Div Equal Expand Gather GatherElements Gelu Identity
    IsNaN LayerNormalization Less LessOrEqual MatMul MatMulNBits Max Min Mul Neg QuantizeLinear RMSNormalization Range
    ReduceMax ReduceSum Relu Reshape RotaryEmbedding Shape Sigmoid Slice Softmax Split Squeeze Sub Tanh TensorScatter
    Transpose Unsqueeze Where
"""
#: Operators every target was seen to parse and run; anything else must be a decision, not an accident of the exporter.
OPERATORS = frozenset(_OPERATORS.split())
_DTYPES = {ir.DataType.INT64: "int64", ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}


def check_contract(graph: ir.Model, spec: GraphSpec) -> None:
    """Compare inputs, outputs, dtypes, dims, operators and cache aliases.

    Raises:
        ContractError: With every difference.
    """
    problems = [
        *interface_problems(spec, interface_of(graph)),
        *_operator_problems(graph),
        *_alias_problems(graph, spec),
        *_weight_problems(graph),
    ]
    if problems:
        raise ContractError(problem_list(f"graph {spec.name} breaks its contract graphs/{spec.name}.toml", problems))


def interface_of(model: ir.Model) -> GraphSpec:
    """The inputs and outputs of a file as it declares them; what has no type is ``undefined``, no shape ``[?]``."""
    graph = model.graph
    return GraphSpec(
        name=graph.name or "graph",
        inputs=tuple(map(_declared, graph.inputs)),
        outputs=tuple(map(_declared, graph.outputs)),
        aliases=(),
    )


def _declared(value: ir.Value) -> TensorSpec:
    dims = ("?",) if value.shape is None else tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    dtype = "undefined" if value.dtype is None else _DTYPES.get(value.dtype, value.dtype.name.lower())
    return TensorSpec(name=value.name or "", dtype=dtype, dims=dims)


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
