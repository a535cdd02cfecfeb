"""SmoothQuant folding: move channel outliers from activations into weights (Xiao et al., arXiv 2211.10438).

Channel j of an activation is divided by ``s_j = absmax(x_j)^alpha / absmax(W_j)^(1 - alpha)`` and row j of the weights
that read it multiplied by it. The division goes into what produces the channel: gain and bias of a norm, or the output
channels of v (attention mixes positions, never channels, so v and o may trade scale; a channel that several heads read
takes one factor for all of them) or of up in a gated MLP. Nothing can be folded through a GELU. All factors are powers
of two, so the folded model computes bit for bit what the original does.

Weight-only kernels quantise the activations too, in blocks of each row, so outlier channels cost them accuracy as they
cost W8A8. What a LayerNorm hands on is known from its gain and bias alone, so FP32 graphs are smoothed without text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from crt_export.config import ModelConfig
from crt_export.graph.weights import SharedArrays
from crt_export.quantize.calibration import ActivationStatistics
from crt_export.quantize.linears import LinearInput, linear_inputs

Array = NDArray[np.float32]

#: How far outliers move, from 0 (they stay in the activations) to 1 (they go into the weights entirely).
ALPHA = 0.5
#: Folded LayerNorm gains, biases and outputs stay below this, a quarter of the largest FP16 value.
FP16_LIMIT = 65504 / 4
#: No channel is rescaled by more than this, so that FP16 gains do not become subnormal.
LARGEST_FACTOR = 2.0**12
#: Of magnitudes after folding; FP32 ends below 2**128.
_LARGEST_EXPONENT = 127
#: Norms with a gain to fold into: operator and number of inputs.
_NORMS = (("LayerNormalization", 3), ("RMSNormalization", 2))
#: A normalised channel rarely exceeds this many standard deviations.
_DEVIATIONS = 4.0


def smoothing_factors(
    tensors: Mapping[str, Array], config: ModelConfig, statistics: ActivationStatistics
) -> dict[str, Array]:
    """What to divide each activation's channels by, float32 [channels] by name, powers of two.

    Args:
        tensors: State of the FP32 model by parameter name, linears as [in, out].
        config: Architecture.
        statistics: Calibrated on the same model.
    """
    folded, factors = dict(tensors), {}
    for group in linear_inputs(config):
        factors[group.name] = _smoothing_factor(folded, group, statistics.inputs[group.name].absmax)
        _fold(folded, group, factors[group.name])
    return factors


def fold(tensors: Mapping[str, Array], config: ModelConfig, factors: Mapping[str, Array]) -> dict[str, Array]:
    """The same function with other magnitudes: factors folded into LayerNorms, v and the weights that read them.

    Args:
        tensors: State of the FP32 model by parameter name, linears as [in, out]; it is not changed.
        config: Architecture.
        factors: What each activation's channels are divided by; 1 where nothing can be folded.
    """
    folded = {name: np.asarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
    for group in linear_inputs(config):
        _fold(folded, group, factors[group.name])
    return folded


def _fold(tensors: dict[str, Array], group: LinearInput, factor: Array) -> None:
    producing = factor if group.producer is None else group.of_producer(factor)
    for name in _producing_tensors(tensors, group):
        tensors[name] = tensors[name] / producing
    for linear in group.linears:
        tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] * factor[:, None]


def _smoothing_factor(tensors: Mapping[str, Array], group: LinearInput, absmax: Array) -> Array:
    """The powers of two to divide one activation's channels by, 1 for the median channel and behind a GELU."""
    producing = _producing_tensors(tensors, group)
    if not producing:
        return np.ones(absmax.shape, np.float32)
    weight = np.max([np.abs(tensors[f"{linear}.weight"]).max(axis=1) for linear in group.linears], axis=0)
    if group.producer is not None:
        return group.of_activation(_factor(group.of_producer(absmax), group.of_producer(weight)))
    return _factor(absmax, weight, [np.abs(tensors[name]) for name in producing])


def _factor(absmax: Array, weight: Array, produced: Sequence[Array] = ()) -> Array:
    """Powers of two for channels of these magnitudes, of the weights that read them, and of what produces them."""
    exponent = balancing_exponents(absmax, weight)
    magnitude = np.max([absmax, *produced], axis=0).astype(np.float64)
    least = np.ceil(np.log2(np.maximum(magnitude, np.finfo(np.float32).tiny) / FP16_LIMIT))
    return np.exp2(np.maximum(exponent, least)).astype(np.float32)


def balancing_exponents(activation: NDArray[np.floating], weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """``log2 s_j``, rounded, 0 for the median channel and for those that are zero on either side.

    Args:
        activation: Largest magnitude of each channel, [channels].
        weight: Largest magnitude of the weights that read it, [channels].
    """
    usable = (activation > 0) & (weight > 0)
    exponent = np.zeros(activation.shape)
    if usable.any():
        wide = activation[usable].astype(np.float64), weight[usable].astype(np.float64)
        log = ALPHA * np.log2(wide[0]) - (1 - ALPHA) * np.log2(wide[1])
        exponent[usable] = log - np.median(log)
    largest = np.log2(LARGEST_FACTOR)
    # Neither the weights that are multiplied nor what is divided by a factor below one leaves the range of FP32.
    room = [np.maximum(0, np.floor(_LARGEST_EXPONENT - _log2(values))) for values in (activation, weight)]
    return np.clip(exponent.round(), -np.minimum(largest, room[0]), np.minimum(largest, room[1]))


def _log2(values: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.log2(np.maximum(values.astype(np.float64), np.finfo(np.float32).tiny))


def _producing_tensors(tensors: Mapping[str, Array], group: LinearInput) -> list[str]:
    """Tensors whose last axis is the activation's channels, and into which a factor can be folded."""
    source = group.norm or group.producer
    return [name for name in (f"{source}.weight", f"{source}.bias") if source is not None and name in tensors]


def smooth_norms(matmuls: Iterable[tuple[str, ir.Node]], shared: SharedArrays) -> None:
    """Balance every LayerNorm of an FP32 graph against the linears that read it, in place.

    Args:
        matmuls: (name, MatMul) of every linear of the graph, as ``weight_matmuls`` finds them. A LayerNorm whose
            readers are spread over several graphs would be folded differently in each; those of a model are not.
        shared: Of the graphs that share these weights.
    """
    readers: dict[ir.Value, tuple[ir.Node, dict[str, ir.Value]]] = {}
    for name, node in matmuls:
        norm = node.inputs[0].producer() if node.inputs[0] is not None else None
        if norm is None or (norm.op_type, len(norm.inputs)) not in _NORMS:
            continue
        gain, weight = norm.inputs[1], node.inputs[1]
        if gain is not None and weight is not None and gain.is_initializer():
            readers.setdefault(gain, (norm, {}))[1][name] = weight
    for gain, (norm, weights) in readers.items():
        biases = [bias for bias in norm.inputs[2:] if bias is not None]
        if all(bias.is_initializer() for bias in biases):
            _balance(gain, biases, [*weights.values()], shared)


def _balance(gain: ir.Value, biases: list[ir.Value], weights: list[ir.Value], shared: SharedArrays) -> None:
    """Gain, bias if there is one, and the weights that read them."""
    values = [gain, *biases, *weights]
    arrays = [_array(value) for value in values]
    made = shared.made(("balanced", len(biases)), arrays, lambda: balanced(*arrays, biased=bool(biases)))
    for value, array in zip(values, made, strict=True):
        value.const_value = ir.tensor(array, name=value.name)


def balanced(gain: NDArray[np.float32], *others: NDArray[np.float32], biased: bool) -> tuple[NDArray[np.float32], ...]:
    """Gain, bias if ``biased``, and weights float32 [in, out] of the same function, channels of similar magnitude."""
    biases, weights = others[: int(biased)], others[int(biased) :]
    activation = _DEVIATIONS * np.abs(gain.astype(np.float64)) + sum(np.abs(bias) for bias in biases)
    largest = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    factor = np.exp2(balancing_exponents(activation, largest)).astype(np.float32)
    return (gain / factor, *(bias / factor for bias in biases), *(weight * factor[:, None] for weight in weights))


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return value.const_value.numpy()
