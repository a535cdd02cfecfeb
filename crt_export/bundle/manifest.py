"""``manifest.json``: what it must contain, reading it, writing it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crt_export.bundle.held import HeldFolder
from crt_export.bundle.integrity import integrity_problem, sealed
from crt_export.bundle.schema import MANIFEST_NAME, SCHEMA_VERSION, TOOL_NAME, manifest_problems
from crt_export.errors import BundleError, problem_list
from crt_export.strict_json import json_problem, parse_json

_MAX_MANIFEST_BYTES = 64 << 20


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a bundle folder.

    Args:
        folder: The bundle.

    Returns:
        The manifest; every key and type that this version relies on is there.

    Raises:
        BundleError: It is missing, unreadable, not JSON, of a newer schema, or breaks the schema (all
            problems listed).
    """
    try:
        held = HeldFolder(folder)
    except OSError as error:
        raise BundleError(f"cannot open the bundle folder {folder}: {error.strerror}") from error
    try:
        return read_manifest_and_identity(held)[0]
    finally:
        held.close()


def read_manifest_and_identity(folder: HeldFolder) -> tuple[dict[str, Any], str]:
    """As :func:`read_manifest`, with the SHA-256 (hex) of the very bytes it was parsed from.

    The manifest holds the SHA-256 of every other file, so its own stands for the whole bundle.
    """
    path = folder.path / MANIFEST_NAME
    content = _read(folder)
    manifest = _parse(path, content)
    version = manifest.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(
            f"{path} is not a manifest of {TOOL_NAME}: "
            f"expected an integer 'schema_version' of 1 or more, found {version!r}"
        )
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}; this {TOOL_NAME} reads up to version "
            f"{SCHEMA_VERSION}: upgrade {TOOL_NAME}, or build the bundle again with this version"
        )
    damage = integrity_problem(manifest)
    if damage:
        raise BundleError(f"{path} was changed after it was written: {damage}; restore the bundle or build it again")
    problems = manifest_problems(manifest)
    if problems:
        raise BundleError(problem_list(f"{path} breaks schema version {version}", problems))
    return manifest, hashlib.sha256(content).hexdigest()


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Serialise a manifest with its digests, and check that :func:`read_manifest` would take it.

    Raises:
        BundleError: A number is NaN or infinite (JSON has neither), or the schema is broken; all problems are
            listed.
    """
    problems = [f"{where} is {value}; write null instead" for where, value in _non_finite(manifest, "")]
    if problems:
        raise BundleError(problem_list("the manifest cannot be written as JSON", problems))
    text = json.dumps(sealed(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    problems = manifest_problems(json.loads(text))
    if problems:
        raise BundleError(problem_list(f"the new manifest breaks schema version {SCHEMA_VERSION}", problems))
    return text


def _non_finite(value: object, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _non_finite(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _non_finite(item, f"{where}[{index}]")


def _read(folder: HeldFolder) -> bytes:
    path = folder.path / MANIFEST_NAME
    try:
        with os.fdopen(folder.open_file(MANIFEST_NAME), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > _MAX_MANIFEST_BYTES:
                raise BundleError(f"{path} has {size} bytes; a manifest has at most {_MAX_MANIFEST_BYTES}")
            return stream.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise BundleError(
            f"{path.parent} is not a bundle: it has no {MANIFEST_NAME}; build one with 'crt-export build'"
        ) from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror} (expected a regular file, not a link)") from error


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    again = "the bundle was changed or is incomplete; build it again"
    try:
        manifest = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} {json_problem(error)}: {again}") from None
    if not isinstance(manifest, dict):
        raise BundleError(f"{path} must hold a JSON object, found {manifest!r:.60}: {again}")
    return manifest
