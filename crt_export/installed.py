"""Which version of a package is installed, and which distribution a module comes from; nothing is imported to tell.

The metadata of a distribution says it where there is one. A frozen application has modules and no metadata, and the
module ``onnxruntime`` comes from several distributions (onnxruntime-openvino, -directml, -qnn, ort-nightly, ...): what
can be imported is installed, whatever it is called.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from functools import cache
from importlib.machinery import ModuleSpec

#: The version of a module that can be imported and does not say which it is.
UNKNOWN = "unknown"
_VERSION = re.compile(r"""^__version__\s*(?::\s*str\s*)?=\s*["']([^"']+)["']""", re.M)


def distribution_version(distribution: str) -> str | None:
    """The version in a distribution's metadata; None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_version(module: str) -> str | None:
    """The version that a module's own source states, ``unknown`` if it does not; None if it cannot be imported."""
    spec = module_spec(module)
    if spec is None:
        return None
    found = _VERSION.search(_source(spec))
    return found[1] if found else UNKNOWN


def module_spec(module: str) -> ModuleSpec | None:
    """Where a module would be imported from; None if nowhere. A folder of that name alone is no module."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a parent is missing; a module without a specification
        return None
    return None if spec is None or spec.origin is None else spec


def distributions_of(module: str) -> tuple[str, ...]:
    """The distributions whose metadata claim a module, in alphabetical order."""
    return tuple(sorted(set(_claims().get(module, ()))))


@cache
def _claims() -> dict[str, list[str]]:
    return {module: list(names) for module, names in importlib.metadata.packages_distributions().items()}


def _source(spec: ModuleSpec) -> str:
    """The module's own text; empty where it has none, as compiled and frozen ones."""
    read = getattr(spec.loader, "get_source", None)
    try:
        return (read(spec.name) if read is not None else None) or ""
    except (ImportError, OSError, SyntaxError, UnicodeDecodeError):
        return ""
