"""W8A8 plan: the range of every activation and what smoothing divides its channels by, decided once on real text.

The plan is all that calibration adds to a checkpoint: :func:`quantize_linears` makes the INT8 weights of both, and
whoever has the plan and the checkpoint can say what a graph must hold. It is kept in the bundle as a safetensors file
of three float32 tensors for each activation::

    <activation>.input_scale   []           step of its int8 grid
    <activation>.input_shift   []           what is subtracted before it is rounded
    <activation>.factor        [channels]   what smoothing divided its channels by, powers of two
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from crt_export.checkpoint import tensor_shapes
from crt_export.config import ModelConfig
from crt_export.errors import BundleError, UnsupportedError, problem_list
from crt_export.models.base import LanguageModel
from crt_export.quantize.calibration import ActivationStatistics, InputStatistics
from crt_export.quantize.linears import LinearInput, linear_inputs
from crt_export.quantize.smoothing import FP16_LIMIT, fold, smoothing_factors

Array = NDArray[np.float32]
#: In a bundle.
PLAN_FILE = "graphs/w8a8.plan.safetensors"
#: Largest magnitude of a symmetric int8 value; -128 is left unused.
LEVELS = 127
#: Scales stay within the normal numbers of FP16, so that a runtime that narrows them loses nothing.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 65504.0
#: Steps of weights below the normal numbers of FP32 are none: their reciprocal may be infinite, and processors that
#: flush subnormal numbers see zero anyway. What is lost is below 1.6e-36.
SMALLEST_STEP = 2.0**-126
#: Per cent of an activation's values inside its range; the full range lost more on the demo (mean KL of its held-out
#: text), and so did the range of least squared error.
PERCENTILE = 99.99


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedInput:
    """One activation: ``int8 = round((x / factor - shift) / scale)``, zero point 0.

    Attributes:
        scale: float32.
        shift: Middle of the range of a one-sided GELU output, float32; 0 for others.
        factor: What smoothing divides its channels by, float32 [channels], powers of two.
    """

    scale: np.float32
    shift: np.float32
    factor: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class W8A8Plan:
    """What every activation that enters a linear becomes, by name (:mod:`crt_export.quantize.linears`)."""

    inputs: Mapping[str, QuantizedInput]

    @property
    def sha256(self) -> str:
        """Hash of the file of the plan, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file; :func:`read_plan` reads it back."""
        tensors = {}
        for name, given in self.inputs.items():
            tensors[f"{name}.input_scale"] = np.asarray(given.scale)
            tensors[f"{name}.input_shift"] = np.asarray(given.shift)
            tensors[f"{name}.factor"] = np.ascontiguousarray(given.factor)
        return save(tensors)

    def value_divisors(self, config: ModelConfig) -> tuple[Array, ...]:
        """What smoothing divides the channels of v by, and with them the value caches, per cache [heads, head_dim]."""
        groups = [group for group in linear_inputs(config) if group.cached]
        return tuple(
            group.of_producer(self.inputs[group.name].factor).reshape(cache.heads, cache.head_dim)
            for group, cache in zip(groups, config.carried.caches, strict=True)
        )


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
    weight_scale: Array
    bias: Array | None


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedLinears:
    """Everything the W8A8 graphs need beyond the FP16 graphs.

    Attributes:
        plan: What they were made by.
        linears: Quantised linears by checkpoint name.
        norms: Gains and biases of norms with the smoothing folded in, float32 by checkpoint name.
    """

    plan: W8A8Plan
    linears: Mapping[str, QuantizedLinear]
    norms: Mapping[str, Array]


def plan_w8a8(model: LanguageModel, statistics: ActivationStatistics) -> W8A8Plan:
    """Choose every factor, scale and shift.

    Args:
        model: The FP32 reference model.
        statistics: Calibrated on it.

    Raises:
        UnsupportedError: An activation would not fit into FP16, or a weight into FP32.
    """
    tensors, groups = _tensors(model), linear_inputs(model.config)
    factors = smoothing_factors(tensors, model.config, statistics)
    _check_range(groups, fold(tensors, model.config, factors), statistics, factors)
    return W8A8Plan(
        inputs={
            group.name: _quantized_input(group, statistics.inputs[group.name], factors[group.name]) for group in groups
        }
    )


def quantize_linears(model: LanguageModel, plan: W8A8Plan) -> QuantizedLinears:
    """The INT8 weights, FP32 biases and folded norms of a model.

    Args:
        model: The FP32 reference model.
        plan: Made for it.
    """
    groups = linear_inputs(model.config)
    folded = fold(_tensors(model), model.config, {name: given.factor for name, given in plan.inputs.items()})
    norms = [group.norm for group in groups if group.norm is not None]
    return QuantizedLinears(
        plan=plan,
        linears={
            name: _quantized_linear(name, group.name, folded, plan.inputs[group.name].shift)
            for group in groups
            for name in group.linears
        },
        norms={
            name: folded[name] for norm in norms for part in ("weight", "bias") if (name := f"{norm}.{part}") in folded
        },
    )


def read_plan(path: Path, config: ModelConfig) -> W8A8Plan:
    """Read the plan of a bundle.

    Args:
        path: What :meth:`W8A8Plan.to_bytes` gave.
        config: The model that it was made for.

    Raises:
        BundleError: It is no plan for this model, with every tensor that is missing, unknown or unusable.
    """
    try:
        found = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: expected the plan of w8a8, a safetensors file ({error}); build it again") from error
    shapes, groups = tensor_shapes(config), linear_inputs(config)
    expected: dict[str, tuple[int, ...]] = {}
    for group in groups:
        channels = shapes.get(f"{group.linears[0]}.weight", shapes["embed.weight"])[1]
        expected |= {f"{group.name}.input_{part}": () for part in ("scale", "shift")}
        expected[f"{group.name}.factor"] = (channels,)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} belongs to no linear of the model" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        values, positive = found[name], not name.endswith("shift")
        if values.dtype != np.float32 or values.shape != expected[name]:
            problems.append(f"{name} is {values.dtype} {list(values.shape)}, expected float32 {list(expected[name])}")
        elif not (np.isfinite(values).all() and (not positive or (values > 0).all())):
            problems.append(f"{name} must be finite{' and above 0' if positive else ''}")
    if problems:
        raise BundleError(problem_list(f"{path}: the plan of w8a8 is not one for this model, build it again", problems))
    return W8A8Plan(
        inputs={
            group.name: QuantizedInput(
                scale=np.float32(found[f"{group.name}.input_scale"]),
                shift=np.float32(found[f"{group.name}.input_shift"]),
                factor=found[f"{group.name}.factor"],
            )
            for group in groups
        }
    )


def value_range(values: NDArray[np.float32], *, symmetric: bool) -> tuple[float, float]:
    """The interval that is represented, all but the outermost values, which saturate.

    Args:
        values: A sample of the activation, any shape.
        symmetric: Whether the interval must be centred on zero.

    Returns:
        Lower and upper end; ``-end, end`` if symmetric.
    """
    if symmetric:
        end = float(np.percentile(np.abs(values), PERCENTILE))
        return -end, end
    outside = (100 - PERCENTILE) / 2
    below, above = np.percentile(values, [outside, 100 - outside])
    return float(below), float(above)


def scale_from_range(low: float, high: float) -> np.float32:
    """Step of the int8 grid that covers an interval centred on its own middle; 1 for an empty interval."""
    half = (high - low) / 2
    return np.float32(np.clip(half / LEVELS, SMALLEST_SCALE, LARGEST_SCALE) if half > 0 else 1.0)


def quantize_columns(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8, one scale per output channel.

    Args:
        weight: float32 [in, out].

    Returns:
        int8 [in, out] and scales float32 [out]; an all-zero channel gets scale 1.
    """
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, np.clip(largest / LEVELS, SMALLEST_SCALE, LARGEST_SCALE), 1.0).astype(np.float32)
    return np.clip(np.rint(weight / scale), -LEVELS, LEVELS).astype(np.int8), scale


def _tensors(model: LanguageModel) -> dict[str, Array]:
    return {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}


def _quantized_input(group: LinearInput, seen: InputStatistics, factor: Array) -> QuantizedInput:
    low, high = value_range(seen.rows / factor, symmetric=not group.after_gelu)
    shift = np.float32((low + high) / 2) if group.after_gelu else np.float32(0)
    return QuantizedInput(scale=scale_from_range(low, high), shift=shift, factor=factor)


def _quantized_linear(name: str, input_name: str, tensors: Mapping[str, Array], shift: np.float32) -> QuantizedLinear:
    weight, scale = quantize_columns(tensors[f"{name}.weight"])
    bias = tensors.get(f"{name}.bias")
    if bias is not None and shift:
        column_sums = weight.astype(np.int64).sum(axis=0) * scale.astype(np.float64)
        bias = (bias + float(shift) * column_sums).astype(np.float32)
    return QuantizedLinear(input=input_name, weight=weight, weight_scale=scale, bias=bias)


def _check_range(
    groups: tuple[LinearInput, ...],
    folded: Mapping[str, Array],
    statistics: ActivationStatistics,
    factors: Mapping[str, Array],
) -> None:
    problems = []
    for group in groups:
        largest = float((statistics.inputs[group.name].absmax / factors[group.name]).max())
        if not largest <= FP16_LIMIT:  # NaN is none either
            problems.append(f"input of {', '.join(group.linears)}: largest magnitude {largest:.6g}")
        problems += [
            f"{name}.weight: its values leave the range of FP32 where its input is scaled down to fit"
            for name in group.linears
            if not np.isfinite(folded[f"{name}.weight"]).all()
        ]
    if problems:
        raise UnsupportedError(
            problem_list(f"W8A8 keeps these in FP16, which needs magnitudes below {FP16_LIMIT:g}", problems)
        )
