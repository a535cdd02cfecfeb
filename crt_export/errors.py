"""Every error this package raises on purpose, and the exit code the command line gives it.

::

    CrtExportError                 2   base class: catch this to catch them all
    ├── CheckpointError            2   config.json or model.safetensors is missing, damaged or inconsistent
    ├── InputError                 2   text, token ids, prompt or an option the caller passed is unusable
    ├── ContractError              2   a graph or a call breaks the tensor contract of graphs/*.toml
    ├── UnsupportedError           2   understood, but this version (or this target) cannot do it
    ├── BundleError                2   a bundle folder is missing, incomplete, tampered with or too new
    ├── BuildError                 2   a graph or an engine could not be produced from valid input
    │   └── NoEngineError          2   the compiler refused or crashed, so there is nothing to check
    ├── BenchError                 2   a measurement could not be completed
    ├── ParityError                1   the result was produced and does not agree with PyTorch
    ├── MissingDependencyError     3   a package, library or device that this operation needs is absent
    └── OutputError                3   stdout is closed or full, or the place of a file is

Exit codes besides these: 0 success, 70 a bug in crt-export, 130 interrupted, 141 nobody reads stdout any more, 143
terminated (129 by SIGHUP).
A message says what was expected, what was found, where, and how to fix it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class CrtExportError(Exception):
    """Base class of every deliberate error."""

    exit_code = 2


class CheckpointError(CrtExportError):
    """The checkpoint folder cannot be used as it is."""


class InputError(CrtExportError):
    """The caller's text, token ids, prompt or option value is unusable."""


class ContractError(CrtExportError):
    """A graph, or a call, breaks the tensor contract of ``graphs/*.toml``."""


class UnsupportedError(CrtExportError):
    """The request is understood, but this version or target cannot serve it."""


class BundleError(CrtExportError):
    """A bundle is missing, incomplete, tampered with, unvalidated or too new."""


class BuildError(CrtExportError):
    """A graph or engine could not be produced from valid input."""


class NoEngineError(BuildError):
    """The compiler made no engine: it refused the graph or crashed on it."""


class BenchError(CrtExportError):
    """A measurement could not be completed."""


class ParityError(CrtExportError):
    """The built result does not agree with PyTorch within its tolerance.

    Attributes:
        report: The parity report as JSON-ready values, every row of it; empty if there is none.
    """

    exit_code = 1

    def __init__(self, message: str, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = dict(report or {})


class MissingDependencyError(CrtExportError):
    """A package, library or device needed for this operation is absent."""

    exit_code = 3


class OutputError(CrtExportError):
    """What a command prints, or a report that it makes, finds no room or no reader."""

    exit_code = 3


def problem_list(heading: str, problems: Sequence[str]) -> str:
    """Format all problems of one kind as a single message.

    Args:
        heading: What was examined and what was expected of it.
        problems: One line per problem, never empty.

    Returns:
        The heading alone with its only problem, or a heading with one bullet per problem.
    """
    if len(problems) == 1:
        return f"{heading}: {problems[0]}"
    bullets = "\n".join(f"  - {problem}" for problem in problems)
    return f"{heading}: {len(problems)} problems\n{bullets}"
