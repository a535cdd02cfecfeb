"""Difference of one output from the reference's: figures, and both sides saved so that Polygraphy's tools open them.

The figures are those that Polygraphy's comparator gives, and no others: its ``SimpleCompareFunc`` takes medians,
deviations and histograms of every tensor as well, which nothing here reads. ``polygraphy inspect data FILE
--show-values`` prints a saved file, ``polygraphy run --load-outputs FILE`` compares its two runs again under other
tolerances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crt_export.errors import InputError, MissingDependencyError
from crt_export.user_files import write_file

Arrays = Mapping[str, NDArray[np.generic]]


class Difference(NamedTuple):
    """How far one tensor is from the reference: largest and mean |difference|, and whether the largest is allowed."""

    largest: float
    mean: float
    passed: bool


def difference(found: NDArray[Any], expected: NDArray[Any], limit: float) -> Difference:
    """Compare two float tensors of one shape, at least one value each, in float32 or what is wider.

    Args:
        found: What the target gave.
        expected: What the reference gave.
        limit: Largest |difference| allowed; NaN, which one NaN makes it, is within none.
    """
    pair = (found, expected)
    found, expected = (side.astype(np.float32) if side.dtype == np.float16 else side for side in pair)
    with np.errstate(all="ignore"):
        error = np.abs(found - expected)
        largest, mean = float(error.max()), float(error.mean(dtype=np.float32))
    return Difference(largest, mean, largest <= limit)


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


def save_outputs(path: Path, runs: Mapping[str, Sequence[Arrays]]) -> None:
    """Write runs as Polygraphy's ``RunResults``, one iteration per call.

    Args:
        path: The JSON file; its folder is created. A link is followed, and nothing but a file is replaced.
        runs: Per name of a run the outputs of every call.

    Raises:
        InputError: It cannot be written.
        MissingDependencyError: Polygraphy is not installed.
    """
    try:
        from polygraphy.comparator import RunResults  # of the extra [export]
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingDependencyError(
            "saving the outputs of the one-step level needs Polygraphy, which is not installed "
            f"({error}): pip install 'crt-export[export]'"
        ) from error
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # it logs what it does to the standard streams
        results = RunResults()
        for name, calls in runs.items():
            results.add([dict(outputs) for outputs in calls], runner_name=name)
        content = str(results.to_json())  # type: ignore[attr-defined]  # added by a decorator
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content.encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
