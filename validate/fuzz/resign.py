"""Sign a damaged bundle again, so that its hashes do not give the damage away."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any, NoReturn

from crt_export.bundle import MANIFEST_NAME
from crt_export.bundle.manifest import manifest_text
from crt_export.errors import BundleError

#: Files beyond this size are holes; hashing them would take all the time there is.
_MOST_HASHED = 64 << 20


def resign(folder: Path) -> None:
    """Write sizes and SHA-256 of the files that are there into the manifest, and sign it.

    A manifest whose JSON no reader takes, or which is no object, stays as it is: nobody comes to its hashes.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or "\0" in name or len(name) > 255 or ".." in name or name.startswith("/"):
            continue
        file = folder / name
        if file.is_file() and file.stat().st_size <= _MOST_HASHED:
            content = file.read_bytes()
            entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    path.write_text(signed_text(manifest), "utf-8", errors="surrogatepass")


def signed_text(manifest: dict[str, Any]) -> str:
    """The text of a manifest as the package writes it; of one that the package refuses to write, its JSON, signed."""
    try:
        return manifest_text(manifest)
    except (BundleError, TypeError, ValueError, AttributeError, RecursionError):
        return json.dumps(_sealed(manifest), indent=2, ensure_ascii=False) + "\n"


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the digests that the package's reader asks for, where it asks for any."""
    try:
        integrity = importlib.import_module("crt_export.bundle.manifest")
        return integrity.sealed(manifest)
    except (ImportError, TypeError, ValueError, OverflowError, RecursionError):
        return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
