"""Smoothing without calibration, on a graph: what a LayerNorm hands on is known from its gain and bias alone.

Weight-only kernels quantise the activations too, in blocks of each row, so outlier channels cost them accuracy as they
cost W8A8. The factors depend on weights only and are powers of two: no text is needed and the function is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from crt_export.memo import Memo
from crt_export.quantize.smooth import balancing_exponents

#: A normalised channel rarely exceeds this many standard deviations.
_DEVIATIONS = 4.0


def smooth_norms(matmuls: Iterable[tuple[str, ir.Node]], memo: Memo) -> None:
    """Balance every LayerNorm of an FP32 graph against the linears that read it, in place.

    Args:
        matmuls: (name, MatMul) of every linear of the graph, as ``weight_matmuls`` finds them. A LayerNorm whose
            readers are spread over several graphs would be folded differently in each; those of a model are not.
        memo: Of the graphs that share these weights.
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
            _balance([gain, bias, *weights.values()], memo)


def _balance(values: list[ir.Value], memo: Memo) -> None:
    """Gain, bias and the weights that read them."""
    arrays = [_array(value) for value in values]
    for value, array in zip(values, memo.made("balanced", arrays, lambda: balanced(*arrays)), strict=True):
        value.const_value = ir.tensor(array, name=value.name)


def balanced(
    gain: NDArray[np.float32], bias: NDArray[np.float32], *weights: NDArray[np.float32]
) -> tuple[NDArray[np.float32], ...]:
    """Gain, bias and weights float32 [in, out] of the same function, with channels of similar magnitude."""
    activation = _DEVIATIONS * np.abs(gain.astype(np.float64)) + np.abs(bias)
    largest = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    factor = np.exp2(balancing_exponents(activation, largest)).astype(np.float32)
    return (gain / factor, bias / factor, *(weight * factor[:, None] for weight in weights))


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return value.const_value.numpy()
