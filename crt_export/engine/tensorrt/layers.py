"""The fused layers of a compiled engine, and what they must look like before the engine is accepted.

They are read from the builder's detailed log or the engine inspector. TensorRT-RTX logs the list while it builds, so it
can be had without a GPU; TensorRT gives the same text through ``EngineInspector.get_engine_information(ONELINE)``. One
line per layer::

    Name: node_matmul_4+node_matmul_3_myl0_5, LayerType: gemm, Inputs: [ { Name: ..., Dimensions: [-1,128],
    ..., Datatype: Half, ... }], Constants: [ ... ], Outputs: [ ... ], TacticName: ..., StreamId: 0,
    Metadata: [ONNX Layer: node_matmul_4][ONNX Layer: node_matmul_3]

A strongly typed graph does not prove it: FP16 scales, for example, turn into INT8 GEMMs that hand raw accumulators
(beyond 65504) through half precision, and ONNX Runtime computes the same file without a complaint.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from crt_export.errors import BuildError, problem_list

# Every spelling of a tensor type that layer lists have been seen with (Format/Datatype is TensorRT 10's field).
_DTYPES = {
    "Float": "float32",
    "FP32": "float32",
    "Half": "float16",
    "FP16": "float16",
    "BFloat16": "bfloat16",
    "BF16": "bfloat16",
    "Int8": "int8",
    "INT8": "int8",
    "UInt8": "uint8",
    "Int32": "int32",
    "INT32": "int32",
    "Int64": "int64",
    "INT64": "int64",
    "Bool": "bool",
    "BOOL": "bool",
    "FP8": "float8",
}
_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)$")
_TENSOR_LIST = re.compile(r"(Inputs|Constants|Outputs): \[((?:\s*\{[^{}]*\},?)*)\]")
_TENSOR = re.compile(r"\{ (.*?) ?\}")
_TENSOR_NAME = re.compile(r"^Name: (.*?), (?:Location|Dimensions): ")
_DIMENSIONS = re.compile(r"Dimensions: \[([-\d, ]*)\]")
_DATATYPE = re.compile(r"(?:Datatype|Format/Datatype): (?:[^,{}]*?\b)?(" + "|".join(_DTYPES) + r")\b")
_ONNX_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_TACTIC = re.compile(r"TacticName: (.*?), StreamId: ")

# Words of a fused kernel's name (__myl_FcAddDivErf_myl0_2, _gemv_mha_v1_myl0_7) that stand for a matrix product.
_GEMM_NAME = re.compile(r"Fc(?=[A-Z_]|$)|Dot(?=[A-Z_]|$)|[Gg]emm|[Gg]emv|[Mm]ma(?=[A-Z_]|$)|MatMul|mha")
_GEMM_KINDS = {"gemm", "gemv", "matrixmultiply", "matrix_multiply", "fullyconnected", "fused_mha", "mha"}


@dataclass(frozen=True, kw_only=True)
class LayerTensor:
    """One tensor that a layer reads or writes.

    Attributes:
        name: The builder's name for it.
        dtype: NumPy-like name, ``float16`` for the log's ``Half``.
        dims: Sizes, -1 where dynamic.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of an engine: a kernel, as a rule.

    Attributes:
        name: The builder's name; a fusion spells the operations in it.
        kind: The builder's layer type, such as ``gemm``, ``kgen`` or ``runtime_fusion``.
        inputs: Activations read.
        constants: Weights read, scalars such as a GEMM's alpha included.
        outputs: Activations written.
        onnx_nodes: Names of the ONNX nodes that this layer computes, wholly or in part.
        tactic: The kernel's name, may be empty.
    """

    name: str
    kind: str
    inputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    onnx_nodes: tuple[str, ...]
    tactic: str

    @property
    def is_gemm(self) -> bool:
        """Whether the layer multiplies matrices, alone, fused with other work or as attention."""
        return self.kind.lower() in _GEMM_KINDS or _GEMM_NAME.search(self.name) is not None

    @property
    def weights(self) -> tuple[LayerTensor, ...]:
        """The constant matrices that an input of fitting width is multiplied with; empty in attention."""
        widths = {tensor.dims[-1] for tensor in self.inputs if tensor.dims}
        return tuple(t for t in self.constants if _is_matrix(t.dims) and widths & set(t.dims[-2:]))

    @property
    def operand_dtypes(self) -> frozenset[str]:
        """Types of the matrices multiplied: of the weights, or of all inputs where there are none."""
        matrices = self.weights or tuple(t for t in self.inputs if len(t.dims) > 1)
        return frozenset(t.dtype for t in matrices if t.dtype in {"float32", "float16", "bfloat16", "int8"})

    def signature(self) -> str:
        """One word for a summary: ``gemm int8 -> float32`` or the layer's kind."""
        if not self.is_gemm:
            return self.kind
        kind = "attention" if "mha" in self.name or "mha" in self.kind else "gemm"
        written = "+".join(sorted({tensor.dtype for tensor in self.outputs}))
        return f"{kind} {'+'.join(sorted(self.operand_dtypes))} -> {written}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return dataclasses.asdict(self)


def layers_from_text(text: str) -> tuple[Layer, ...]:
    """Parse a layer list, from its ``Layers:`` heading (or the first layer) to the list of bindings.

    Raises:
        BuildError: The text holds no layer, or a line that cannot be understood: a check over a list that
            was half read would prove nothing.
    """
    body = re.split(r"^(?:I/O Tensors|Bindings):", text, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line.strip() for line in body.splitlines() if line.strip() and line.strip() != "Layers:"]
    layers, problems = [], []
    for line in lines:
        try:
            layers.append(_layer_from_line(line))
        except ValueError as error:
            problems.append(f"{error} in: {line[:200]}")
    if not lines:
        problems.append("no layer in the builder's detailed log")
    if problems:
        raise BuildError(problem_list("the builder's layer list is not understood", problems))
    return tuple(layers)


def summarize_layers(layers: Iterable[Layer]) -> dict[str, int]:
    """Count layers by :meth:`Layer.signature`, most frequent first."""
    return dict(Counter(layer.signature() for layer in layers).most_common())


def _is_matrix(dims: tuple[int, ...]) -> bool:
    return len(dims) >= 2 and dims[-1] > 1 and dims[-2] > 1


def _layer_from_line(line: str) -> Layer:
    head = _LAYER.match(line)
    if head is None:
        raise ValueError("no 'Name: ..., LayerType: ...'")
    metadata = head["rest"].rpartition("Metadata:")
    lists = {
        key: tuple(map(_tensor_from_text, _TENSOR.findall(body))) for key, body in _TENSOR_LIST.findall(metadata[0])
    }
    if not {"Inputs", "Outputs"} <= lists.keys():
        raise ValueError("no Inputs and Outputs")
    tactic = _TACTIC.search(metadata[0])
    return Layer(
        name=head["name"],
        kind=head["kind"],
        inputs=lists["Inputs"],
        constants=lists.get("Constants", ()),
        outputs=lists["Outputs"],
        onnx_nodes=tuple(_ONNX_NODE.findall(metadata[2])),
        tactic=tactic[1] if tactic else "",
    )


def _tensor_from_text(text: str) -> LayerTensor:
    name, dims, dtype = (pattern.search(text) for pattern in (_TENSOR_NAME, _DIMENSIONS, _DATATYPE))
    if name is None or dims is None or dtype is None:
        raise ValueError(f"a tensor without name, dimensions or known datatype ({text[:120]})")
    sizes = tuple(int(size) for size in dims[1].split(",") if size.strip())
    return LayerTensor(name=name[1], dtype=_DTYPES[dtype[1]], dims=sizes)


def check_layers(
    layers: Sequence[Layer],
    *,
    precision: str,
    linears: Sequence[str],
    products: Sequence[str] = (),
    engine: str = "engine",
) -> None:
    """Check the matrix products of an engine.

    Every product of the ONNX graph must be found again in a GEMM layer (otherwise the list proves nothing about
    it). With precision ``fp16`` and ``w8a8`` no GEMM may compute in FP32. With ``w8a8`` every linear must be an
    INT8 GEMM, and no INT8 GEMM may write FP16.

    Args:
        layers: The fused layers.
        precision: ``fp16``, ``w8a8`` or ``fp32`` (which only asks for every product to be found).
        linears: Names of the ONNX nodes that multiply by a weight.
        products: Names of the other ONNX nodes that multiply matrices: attention.
        engine: What to call the engine in the message.

    Raises:
        BuildError: Names every layer and node at fault.
    """
    problems = [*_missing_products(layers, (*linears, *products))]
    if precision != "fp32":
        problems += _fp32_gemms(layers)
    if precision == "w8a8":
        problems += _linears_not_int8(layers, linears)
        problems += _half_accumulators(layers)
    if problems:
        raise BuildError(problem_list(f"layers of {engine}, precision {precision}", problems))


def is_int8_gemm(layer: Layer) -> bool:
    """Whether a layer multiplies INT8 activations by INT8 weights."""
    weights_int8 = any(tensor.dtype == "int8" for tensor in layer.weights)
    return layer.is_gemm and weights_int8 and any(tensor.dtype == "int8" for tensor in layer.inputs)


def _gemms_of(layers: Iterable[Layer], node: str) -> list[Layer]:
    return [layer for layer in layers if layer.is_gemm and node in layer.onnx_nodes]


def _missing_products(layers: Sequence[Layer], nodes: Iterable[str]) -> Iterator[str]:
    for node in nodes:
        if not _gemms_of(layers, node):
            near = [layer.name for layer in layers if node in layer.onnx_nodes]
            yield f"no GEMM layer computes ONNX node {node} (layers that mention it: {', '.join(near) or 'none'})"


def _fp32_gemms(layers: Iterable[Layer]) -> Iterator[str]:
    for layer in layers:
        if layer.is_gemm and layer.operand_dtypes == {"float32"}:
            yield f"{layer.name} is an FP32 GEMM, for ONNX nodes {', '.join(layer.onnx_nodes) or '(none)'}"


def _linears_not_int8(layers: Sequence[Layer], linears: Iterable[str]) -> Iterator[str]:
    for node in linears:
        for layer in _gemms_of(layers, node):
            if not is_int8_gemm(layer):
                yield f"linear {node} is computed by {layer.name} ({layer.signature()}), which is no INT8 GEMM"


def _half_accumulators(layers: Iterable[Layer]) -> Iterator[str]:
    for layer in layers:
        if is_int8_gemm(layer) and any(tensor.dtype == "float16" for tensor in layer.outputs):
            yield (
                f"{layer.name} is an INT8 GEMM with a Half output: its accumulators can exceed 65504; "
                "quantise with FP32 scales and cast to FP16 after the bias"
            )
