"""What an engine's fused layers must look like before the engine is accepted.

A strongly typed graph does not prove it: FP16 scales, for example, turn into INT8 GEMMs that hand raw accumulators
(beyond 65504) through half precision, and ONNX Runtime computes the same file without a complaint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from crt_export.engine.layers import Layer
from crt_export.errors import BuildError, problem_list


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
