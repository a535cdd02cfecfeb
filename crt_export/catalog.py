"""The tracked definitions: graph contracts, engine profiles, tolerances.

They live in the folders ``graphs/``, ``engines/`` and ``validate/`` of a checkout, and in
``crt_export/_catalog/`` of an installed wheel. Nothing else in the package builds such a path. A package that is
imported from a zip file or a frozen application has its files in there, so what is found is no ``Path`` but can be read
like one.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from crt_export.errors import MissingDependencyError

Kind = Literal["graphs", "engines", "validate"]

_PACKAGE: Traversable = files("crt_export")


def catalog_root() -> Traversable:
    """Return the folder that holds the three definition folders.

    The wheel's copy wins: beside an installed package lies site-packages, where a folder called
    ``graphs`` would belong to somebody else.
    """
    packed = _PACKAGE.joinpath("_catalog")
    if packed.is_dir() or not isinstance(_PACKAGE, Path):
        return packed
    return _PACKAGE.resolve().parent


def definition_path(kind: Kind, filename: str) -> Traversable:
    """Return one definition file.

    Args:
        kind: Which catalogue to look in.
        filename: A bare file name such as ``step.toml``.

    Raises:
        MissingDependencyError: The installation lacks the file.
    """
    path = catalog_root().joinpath(kind).joinpath(filename)
    if Path(filename).name != filename or not path.is_file():
        raise MissingDependencyError(
            f"definition {kind}/{filename} is not part of this installation ({catalog_root()}): reinstall crt-export"
        )
    return path


def default_text() -> Traversable:
    """Return the real text that a bundle is compared on when the caller gives none: the demo's held-out text.

    Raises:
        MissingDependencyError: The installation lacks the file.
    """
    checkout = catalog_root().joinpath("examples").joinpath("demo").joinpath("heldout.txt")
    return checkout if checkout.is_file() else definition_path("validate", "heldout.txt")


def definitions(kind: Kind) -> list[Traversable]:
    """Return all TOML definitions of a kind, sorted by name.

    Raises:
        MissingDependencyError: The installation has none, so it is incomplete.
    """
    folder = catalog_root().joinpath(kind)
    entries = folder.iterdir() if folder.is_dir() else ()
    found = sorted((entry for entry in entries if entry.name.endswith(".toml")), key=lambda entry: entry.name)
    if not found:
        raise MissingDependencyError(f"this installation has no {kind}/*.toml ({catalog_root()}): reinstall crt-export")
    return found


def sources() -> list[Traversable]:
    """Every source file of this package, in an order that does not depend on where it is installed."""
    return sorted(_sources_in(_PACKAGE), key=str)


def _sources_in(folder: Traversable) -> Iterator[Traversable]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources_in(entry)
        elif entry.name.endswith(".py"):
            yield entry
