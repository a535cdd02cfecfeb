"""From observed values to the range that 8 bits have to cover."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Largest magnitude of a symmetric int8 value; -128 is left unused.
LEVELS = 127
#: Scales stay within the normal numbers of FP16, so that a runtime that narrows them loses nothing.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 65504.0
#: Steps of weights below the normal numbers of FP32 are none: their reciprocal may be infinite, and processors that
#: flush subnormal numbers see zero anyway. What is lost is below 1.6e-36.
SMALLEST_STEP = 2.0**-126
RANGE_METHODS = ("percentile", "mse", "max")
_MSE_STEPS = 40
_MSE_VALUES = 262_144


def value_range(
    values: NDArray[np.float32], low: float, high: float, *, method: str, percentile: float, symmetric: bool
) -> tuple[float, float]:
    """The interval that is represented; values outside it saturate.

    Args:
        values: A sample of the activation, any shape.
        low: Smallest value ever seen, at most the sample's.
        high: Largest value ever seen.
        method: ``max`` covers everything seen, ``percentile`` all but the outermost values, ``mse`` shrinks the full
            range until rounding and saturation together lose least.
        percentile: Per cent of the values that ``percentile`` covers.
        symmetric: Whether the interval must be centred on zero.

    Returns:
        Lower and upper end; ``-end, end`` if symmetric.
    """
    if symmetric:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    if method == "max":
        return low, high
    if method == "mse":
        return _least_squares_range(values, low, high)
    if symmetric:
        end = float(np.percentile(np.abs(values), percentile))
        return -end, end
    outside = (100 - percentile) / 2
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


def _least_squares_range(values: NDArray[np.float32], low: float, high: float) -> tuple[float, float]:
    """Shrink the range around its middle in even steps; keep the one with the smallest mean squared error."""
    flat = values.ravel()
    flat = flat[:: -(-flat.size // _MSE_VALUES)].astype(np.float64)
    centre, half = (low + high) / 2, (high - low) / 2
    if half <= 0:
        return low, high

    def error(part: float) -> float:
        step = half * part / LEVELS
        kept = np.clip(np.rint((flat - centre) / step), -LEVELS, LEVELS) * step
        return float(np.square(kept - (flat - centre)).mean())

    best = min((k / _MSE_STEPS for k in range(1, _MSE_STEPS + 1)), key=error)
    return centre - half * best, centre + half * best
