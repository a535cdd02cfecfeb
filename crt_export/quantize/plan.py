"""W8A8: what every linear becomes, decided once and shared by all graphs of the precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crt_export.errors import InputError, UnsupportedError, problem_list
from crt_export.model import Model
from crt_export.quantize.calibration import ActivationStatistics
from crt_export.quantize.linears import LinearInput, linear_inputs
from crt_export.quantize.ranges import RANGE_METHODS, quantize_columns, scale_from_range, value_range
from crt_export.quantize.smooth import FP16_LIMIT, Folded, fold


@dataclass(frozen=True, kw_only=True)
class W8A8Options:
    """How W8A8 is done; the defaults lost least on the demo (mean KL over its held-out text).

    Attributes:
        smooth: Fold channel outliers into the weights.
        alpha: How far, from 0 (not at all) to 1 (entirely).
        range_method: ``percentile``, ``mse`` or ``max``, see :func:`crt_export.quantize.ranges.value_range`.
        percentile: Per cent of the values inside the range, for ``percentile``.
        gelu_shift: Quantise ``g - c`` instead of a one-sided GELU output ``g``, with c in the middle of its range.
    """

    smooth: bool = True
    alpha: float = 0.5
    range_method: str = "percentile"
    percentile: float = 99.99
    gelu_shift: bool = True

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: With every value that is out of range.
        """
        problems = []
        if not 0 <= self.alpha <= 1:
            problems.append(f"alpha must be in [0, 1], found {self.alpha}")
        if self.range_method not in RANGE_METHODS:
            problems.append(f"range_method must be one of {', '.join(RANGE_METHODS)}, found {self.range_method!r}")
        if not 50 < self.percentile <= 100:
            problems.append(f"percentile must be in (50, 100], found {self.percentile}")
        if problems:
            raise InputError(problem_list("W8A8 options", problems))

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class QuantizedInput:
    """One activation: ``int8 = round((x - shift) / scale)``, zero point 0."""

    scale: np.float32
    shift: np.float32


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedLinear:
    """One linear: ``y = scale_x * q(x) @ (weight * weight_scale) + bias``.

    Attributes:
        input: Name of its activation in :attr:`W8A8Plan.inputs`.
        weight: int8 [in, out], symmetric.
        weight_scale: float32 [out].
        bias: float32 [out], the input's shift folded in; None where the model has none.
    """

    input: str
    weight: NDArray[np.int8]
    weight_scale: NDArray[np.float32]
    bias: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class W8A8Plan:
    """Everything the W8A8 graphs need beyond the FP16 graphs.

    Attributes:
        options: What it was made with.
        inputs: Quantised activations by name.
        linears: Quantised linears by checkpoint name.
        norms: LayerNorm gains and biases with the smoothing folded in, float32 by checkpoint name.
        factors: What each activation's channels were divided by, powers of two.
    """

    options: W8A8Options
    inputs: Mapping[str, QuantizedInput]
    linears: Mapping[str, QuantizedLinear]
    norms: Mapping[str, NDArray[np.float32]]
    factors: Mapping[str, NDArray[np.float32]]


def plan_w8a8(model: Model, statistics: ActivationStatistics, options: W8A8Options | None = None) -> W8A8Plan:
    """Fold, then choose every scale, shift, int8 weight and bias.

    Args:
        model: The FP32 reference model.
        statistics: Calibrated on it.
        options: How.

    Raises:
        UnsupportedError: A LayerNorm or its output would not fit into FP16.
    """
    options = options or W8A8Options()
    tensors = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    groups = linear_inputs(model.config)
    if options.smooth:
        folded = fold(tensors, model.config, statistics, alpha=options.alpha)
    else:
        ones = {group.name: np.ones_like(statistics.inputs[group.name].low) for group in groups}
        folded = Folded(tensors=tensors, factors=ones)
    _check_half_range(groups, folded, statistics)
    inputs = {group.name: _quantized_input(group, folded, statistics, options) for group in groups}
    linears = {
        name: _quantized_linear(name, group.name, folded.tensors, inputs[group.name])
        for group in groups
        for name in group.linears
    }
    norms = {
        f"{group.norm}.{part}": folded.tensors[f"{group.norm}.{part}"]
        for group in groups
        if group.norm is not None
        for part in ("weight", "bias")
    }
    return W8A8Plan(options=options, inputs=inputs, linears=linears, norms=norms, factors=folded.factors)


def _quantized_input(
    group: LinearInput, folded: Folded, statistics: ActivationStatistics, options: W8A8Options
) -> QuantizedInput:
    seen, factor = statistics.inputs[group.name], folded.factors[group.name]
    shifted = group.after_gelu and options.gelu_shift
    low, high = value_range(
        seen.rows / factor,
        float((seen.low / factor).min()),
        float((seen.high / factor).max()),
        method=options.range_method,
        percentile=options.percentile,
        symmetric=not shifted,
    )
    shift = np.float32((low + high) / 2) if shifted else np.float32(0)
    return QuantizedInput(scale=scale_from_range(low, high), shift=shift)


def _quantized_linear(
    name: str, input_name: str, tensors: Mapping[str, NDArray[np.float32]], quantized_input: QuantizedInput
) -> QuantizedLinear:
    weight, scale = quantize_columns(tensors[f"{name}.weight"])
    bias = tensors.get(f"{name}.bias")
    if bias is not None and quantized_input.shift:
        column_sums = weight.astype(np.int64).sum(axis=0) * scale.astype(np.float64)
        bias = (bias + float(quantized_input.shift) * column_sums).astype(np.float32)
    return QuantizedLinear(input=input_name, weight=weight, weight_scale=scale, bias=bias)


def _check_half_range(groups: tuple[LinearInput, ...], folded: Folded, statistics: ActivationStatistics) -> None:
    problems = []
    for group in groups:
        found = {
            f"input of {', '.join(group.linears)}": statistics.inputs[group.name].absmax / folded.factors[group.name]
        }
        if group.norm is not None:
            found |= {f"{group.norm}.{part}": folded.tensors[f"{group.norm}.{part}"] for part in ("weight", "bias")}
        problems += [
            f"{what}: largest magnitude {float(np.abs(values).max()):.6g}"
            for what, values in found.items()
            if not np.abs(values).max() <= FP16_LIMIT  # NaN is none either
        ]
        weights = {f"{name}.weight": folded.tensors[f"{name}.weight"] for name in group.linears}
        problems += [
            f"{name}: its values leave the range of FP32 where its input is scaled down to fit"
            for name, values in weights.items()
            if not np.isfinite(values).all()
        ]
    if problems:
        raise UnsupportedError(
            problem_list(f"W8A8 keeps these in FP16, which needs magnitudes below {FP16_LIMIT:g}", problems)
        )
