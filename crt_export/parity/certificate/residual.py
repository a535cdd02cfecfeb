"""The residual that the graph reports against the error that it stands for.

A fixed-point iteration that contracts by q per pass has an error of at most q / (1 - q) times its last change, so the
residual bounds the error where q is below one half. Once only rounding is left the error no longer falls and the
residual says nothing about it: the ratio tells where that begins.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from crt_export.parity.certificate.coverage import Coverage
from crt_export.parity.certificate.measurement import Measurement

_FEWEST_WINDOWS = 3


def residual_curve(measured: Measurement, coverage: Coverage) -> list[dict[str, Any]]:
    """The agreed ``residual`` of the level's data, one entry per number of passes, windows as units."""
    return [
        _entry(passes, measured.residual[index], measured.error[index]) for index, passes in enumerate(coverage.passes)
    ]


def _entry(passes: int, residual: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    moved = residual > 0
    ratio = error[moved] / residual[moved]
    return {
        "passes": passes,
        "residual_median": float(np.median(residual)),
        "error_median": float(np.median(error)),
        "error_max": float(error.max()),
        "ratio_median": float(np.median(ratio)) if len(ratio) else None,
        "ratio_p95": float(np.percentile(ratio, 95)) if len(ratio) else None,
        "correlation": _log_correlation(residual, error),
    }


def _log_correlation(residual: np.ndarray, error: np.ndarray) -> float | None:
    """Pearson's correlation of the logarithms over windows; None where it has no meaning."""
    positive = (residual > 0) & (error > 0)
    if positive.sum() < _FEWEST_WINDOWS:
        return None
    pair = np.log(np.stack([residual[positive], error[positive]]).astype(np.float64))
    if (np.ptp(pair, axis=1) == 0).any():
        return None
    return float(np.corrcoef(pair)[0, 1])
