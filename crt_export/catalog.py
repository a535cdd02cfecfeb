"""Find the tracked definitions: graph contracts, engine profiles, tolerances.

They live in the folders ``graphs/``, ``engines/`` and ``validate/`` of a checkout, and in
``crt_export/_catalog/`` of an installed wheel. Nothing else in the package builds such a path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from crt_export.errors import MissingDependencyError

Kind = Literal["graphs", "engines", "validate"]

_PACKAGE = Path(__file__).resolve().parent


def catalog_root() -> Path:
    """Return the folder that holds the three definition folders.

    The wheel's copy wins: beside an installed package lies site-packages, where a folder called
    ``graphs`` would belong to somebody else.
    """
    packed = _PACKAGE / "_catalog"
    return packed if packed.is_dir() else _PACKAGE.parent


def definition_path(kind: Kind, filename: str) -> Path:
    """Return the path of one definition file.

    Args:
        kind: Which catalogue to look in.
        filename: A bare file name such as ``step.toml``.

    Raises:
        MissingDependencyError: The installation lacks the file.
    """
    path = catalog_root() / kind / filename
    if Path(filename).name != filename or not path.is_file():
        raise MissingDependencyError(
            f"definition {kind}/{filename} is not part of this installation ({catalog_root()}): reinstall crt-export"
        )
    return path


def default_text() -> Path:
    """Return the real text that a bundle is compared on when the caller gives none: the demo's held-out text.

    Raises:
        MissingDependencyError: The installation lacks the file.
    """
    checkout = catalog_root() / "examples" / "demo" / "heldout.txt"
    return checkout if checkout.is_file() else definition_path("validate", "heldout.txt")


def definitions(kind: Kind, suffix: str = ".toml") -> list[Path]:
    """Return the paths of all definitions of a kind that end in ``suffix``, sorted by name.

    Raises:
        MissingDependencyError: The installation has none, so it is incomplete.
    """
    found = sorted((catalog_root() / kind).glob(f"*{suffix}"))
    if not found:
        raise MissingDependencyError(
            f"this installation has no {kind}/*{suffix} ({catalog_root()}): reinstall crt-export"
        )
    return found
