"""Outputs of two runs in Polygraphy's own form: compared by its comparator, saved so that its tools open them.

``polygraphy inspect data FILE --show-values`` prints a saved file, ``polygraphy run --load-outputs FILE`` compares its
two runs again under other tolerances.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crt_export.errors import MissingDependencyError

Arrays = Mapping[str, NDArray[np.generic]]


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


def compare_outputs(found: Arrays, expected: Arrays, limits: Mapping[str, float]) -> dict[str, Difference]:
    """Compare tensors of equal shape by Polygraphy's ``SimpleCompareFunc`` on the largest absolute difference.

    Args:
        found: What the target gave, contiguous float tensors only.
        expected: What the reference gave, under the same names.
        limits: Largest |difference| allowed, per name.

    Raises:
        MissingDependencyError: Polygraphy is not installed.
    """
    comparator = _comparator()
    results = _results({"found": [found], "expected": [expected]})
    # An absolute or a relative limit may hold; with 0 for the relative one only the absolute counts.
    function = comparator.SimpleCompareFunc(check_error_stat="max", atol=dict(limits), rtol=0.0)
    with _quiet(), np.errstate(all="ignore"):
        accuracy = comparator.Comparator.compare_accuracy(results, compare_func=function)
    (compared,) = accuracy[0]["found", "expected"]
    return {
        name: Difference(largest=result.max_absdiff, mean=result.mean_absdiff, passed=bool(result))
        for name, result in compared.items()
    }


def save_outputs(path: Path, runs: Mapping[str, Sequence[Arrays]]) -> None:
    """Write runs as Polygraphy's ``RunResults``, one iteration per call.

    Args:
        path: The JSON file; its folder is created.
        runs: Per name of a run the outputs of every call.

    Raises:
        MissingDependencyError: Polygraphy is not installed.
    """
    results = _results(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet():
        results.save(str(path))


def _results(runs: Mapping[str, Sequence[Arrays]]) -> Any:
    results = _comparator().RunResults()
    for name, calls in runs.items():
        results.add([dict(outputs) for outputs in calls], runner_name=name)
    return results


def _comparator() -> Any:
    try:
        return importlib.import_module("polygraphy.comparator")
    except ImportError as error:
        raise MissingDependencyError(
            f"the one-step level needs Polygraphy, which is not installed ({error}): pip install 'crt-export[export]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy logs every comparison to the standard streams; what it found is in its results."""
    logger = importlib.import_module("polygraphy.logger").G_LOGGER
    with logger.verbosity(logger.CRITICAL):
        yield
