"""Smoothing without calibration, on a graph: what a LayerNorm hands on is known from its gain and bias alone.

Weight-only kernels quantise the activations too, in blocks of each row, so outlier channels cost them accuracy as they
cost W8A8. The factors depend on weights only and are powers of two: no text is needed and the function is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from crt_export.quantize.smooth import balancing_exponents

#: A normalised channel rarely exceeds this many standard deviations.
_DEVIATIONS = 4.0
_ALPHA = 0.5


def smooth_norms(matmuls: Iterable[tuple[str, ir.Node]]) -> None:
    """Balance every LayerNorm of an FP32 graph against the linears that read it, in place.

    Args:
        matmuls: (name, MatMul) of every linear of the graph, as ``weight_matmuls`` finds them. A LayerNorm whose
            readers are spread over several graphs would be folded differently in each; those of a model are not.
    """
    readers: dict[ir.Value, tuple[ir.Node, dict[str, ir.Value]]] = {}
    for name, node in matmuls:
        norm = node.inputs[0].producer() if node.inputs[0] is not None else None
        if norm is None or norm.op_type != "LayerNormalization" or len(norm.inputs) < 3:
            continue
        gain, weight = norm.inputs[1], node.inputs[1]
        if gain is not None and weight is not None and gain.is_initializer():
            readers.setdefault(gain, (norm, {}))[1][name] = weight
    for gain, (norm, weights) in readers.items():
        bias = norm.inputs[2]
        if bias is not None and bias.is_initializer():
            _balance(gain, bias, [*weights.values()])


def _balance(gain: ir.Value, bias: ir.Value, weights: list[ir.Value]) -> None:
    activation = _DEVIATIONS * np.abs(_array(gain)) + np.abs(_array(bias))
    largest = np.max([np.abs(_array(weight)).max(axis=1) for weight in weights], axis=0)
    factor = np.exp2(balancing_exponents(activation, largest, _ALPHA)).astype(np.float32)
    for value in (gain, bias):
        value.const_value = ir.tensor(_array(value) / factor, name=value.name)
    for weight in weights:
        weight.const_value = ir.tensor(_array(weight) * factor[:, None], name=weight.name)


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return value.const_value.numpy()
