"""Outputs of two runs in Polygraphy's own form, saved so that its tools open them.

``polygraphy inspect data FILE --show-values`` prints a saved file, ``polygraphy run --load-outputs FILE`` compares its
two runs again under other tolerances.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crt_export.errors import InputError, MissingDependencyError
from crt_export.user_files import write_file

Arrays = Mapping[str, NDArray[np.generic]]


def save_outputs(path: Path, runs: Mapping[str, Sequence[Arrays]]) -> None:
    """Write runs as Polygraphy's ``RunResults``, one iteration per call.

    Args:
        path: The JSON file; its folder is created. A link is followed, and nothing but a file is replaced.
        runs: Per name of a run the outputs of every call.

    Raises:
        InputError: It cannot be written.
        MissingDependencyError: Polygraphy is not installed.
    """
    with _quiet():
        content = str(_results(runs).to_json())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content.encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


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
            "saving the outputs of the one-step level needs Polygraphy, which is not installed "
            f"({error}): pip install 'crt-export[export]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy logs what it does to the standard streams."""
    logger = importlib.import_module("polygraphy.logger").G_LOGGER
    with logger.verbosity(logger.CRITICAL):
        yield
