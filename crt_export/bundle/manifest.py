"""``manifest.json``: reading it, writing it, and the digests by which it protects itself.

The digests are ``"integrity": {"manifest": ..., "files": ...}``. ``files`` is the SHA-256 of the table of files;
``manifest`` that of everything else, ``integrity.files`` included. Both are over values, not over bytes, so that a
manifest may be written with other spaces or in another order. The values are serialised like this
(``engines/cpp/src/bundle/integrity.cpp`` does the same)::

    null n   false f   true t   integer i<decimal>e   other number d<16 hex digits: its IEEE 754 double>
    text <bytes>:<UTF-8>   list l<values>e   object o<text><value>...e, sorted by the UTF-8 of the keys

A tool that copies or repairs a bundle may write a new table of files without knowing these digests: such a table is
believed when every file, hashed at once, proves it. Nothing else in a manifest can change unnoticed by accident. Who
means to forge one can of course compute the digests as well: compare the bundle's identity with one you trust.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crt_export.bundle.held import HeldFolder
from crt_export.bundle.schema import MANIFEST_NAME, SCHEMA_VERSION, TOOL_NAME, manifest_problems
from crt_export.errors import BundleError, problem_list
from crt_export.strict_json import json_problem, parse_json

_MAX_MANIFEST_BYTES = 64 << 20
_INTEGRITY = "integrity"
_FILES = "files"
_SINGLE = {None: b"n", False: b"f", True: b"t"}


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


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the digests of what it holds; they stand before the table of files."""
    rest = {key: value for key, value in manifest.items() if key not in (_INTEGRITY, _FILES)}
    files = _digest(manifest.get(_FILES))
    digests = {_INTEGRITY: {"manifest": _manifest_digest(rest, files), "files": files}}
    return {**rest, **digests, **({_FILES: manifest[_FILES]} if _FILES in manifest else {})}


def integrity_problem(manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with everything but the table of files; None if it is as it was written."""
    found = manifest.get(_INTEGRITY)
    if not isinstance(found, Mapping) or found.keys() != {"manifest", "files"}:
        return f"expected an object {_INTEGRITY!r} with the digests 'manifest' and 'files', found {found!r:.60}"
    rest = {key: value for key, value in manifest.items() if key not in (_INTEGRITY, _FILES)}
    digest = _manifest_digest(rest, found["files"])
    if digest != found["manifest"]:
        return f"its content has the digest {digest}, {_INTEGRITY}.manifest says {found['manifest']!r:.80}"
    return None


def files_are_as_written(manifest: Mapping[str, Any]) -> bool:
    """Whether the table of files is the one the manifest was written with."""
    return _digest(manifest[_FILES]) == manifest[_INTEGRITY]["files"]


def _manifest_digest(rest: Mapping[str, Any], files_digest: object) -> str:
    return _digest({**rest, _INTEGRITY: {"files": files_digest}})


def _digest(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def canonical(value: object) -> bytes:
    """The bytes that stand for a JSON value; of at most 200 levels, as the reader of manifests makes sure."""
    parts: list[bytes] = []
    _append(parts, value)
    return b"".join(parts)


def _append(parts: list[bytes], value: object) -> None:
    if value is None or isinstance(value, bool):
        parts.append(_SINGLE[value])
    elif isinstance(value, int):
        parts.append(b"i%de" % value)
    elif isinstance(value, float):
        parts.append(b"d" + struct.pack(">d", value).hex().encode())
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        parts.append(b"%d:" % len(text) + text)
    elif isinstance(value, Mapping):
        parts.append(b"o")
        for key in sorted(value, key=lambda name: name.encode("utf-8", "surrogatepass")):
            _append(parts, key)
            _append(parts, value[key])
        parts.append(b"e")
    elif isinstance(value, list | tuple):
        parts.append(b"l")
        for item in value:
            _append(parts, item)
        parts.append(b"e")
    else:
        raise TypeError(f"{type(value).__name__} is no JSON value")
