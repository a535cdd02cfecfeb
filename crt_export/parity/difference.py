"""Difference of one output from the reference's: the figures that Polygraphy's comparator gives, and no others.

Its ``SimpleCompareFunc`` takes medians, deviations and histograms of every tensor as well, which nothing here reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one tensor is from the reference.

    Attributes:
        largest: Largest |difference|, NaN if any is.
        mean: Mean |difference|.
        passed: Whether the largest is within its limit.
    """

    largest: float
    mean: float
    passed: bool


def difference(found: NDArray[Any], expected: NDArray[Any], limit: float) -> Difference:
    """Compare two float tensors of one shape, at least one value each, in float32 or what is wider.

    Args:
        found: What the target gave.
        expected: What the reference gave.
        limit: Largest |difference| allowed; NaN is within none.
    """
    with np.errstate(all="ignore"):
        error = np.abs(_widened(found) - _widened(expected))
        largest, mean = float(error.max()), float(error.mean(dtype=np.float32))
    return Difference(largest=largest, mean=mean, passed=largest <= limit)


def relative_error(found: NDArray[Any], expected: NDArray[Any], scale: float | None = None) -> float:
    """Largest |difference| over the largest |expected|, or over ``scale``.

    NaN where either holds one, infinite where shapes differ.
    """
    if found.shape != expected.shape:
        return float("inf")
    wide = expected.astype(np.float32, copy=False)
    largest = float(np.abs(wide).max(initial=0.0)) if scale is None else scale
    with np.errstate(invalid="ignore"):
        error = float(np.abs(found.astype(np.float32, copy=False) - wide).max(initial=0.0))
    return error / max(largest, float(np.finfo(np.float32).tiny))


def _widened(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.float32) if values.dtype == np.float16 else values
