"""Ranges and steps of 8 bits: what observed values and weights become."""

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
#: Per cent of an activation's values inside its range; the full range lost more on the demo (mean KL of its held-out
#: text), and so did the range of least squared error.
PERCENTILE = 99.99


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
