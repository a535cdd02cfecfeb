"""Digests by which ``manifest.json`` protects itself: ``"integrity": {"manifest": ..., "files": ...}``.

``files`` is the SHA-256 of the table of files; ``manifest`` that of everything else, ``integrity.files`` included. Both
are over values, not over bytes, so that a manifest may be written with other spaces or in another order. The values are
serialised like this (``engines/cpp/src/bundle/integrity.cpp`` does the same)::

    null n   false f   true t   integer i<decimal>e   other number d<16 hex digits: its IEEE 754 double>
    text <bytes>:<UTF-8>   list l<values>e   object o<text><value>...e, sorted by the UTF-8 of the keys

A tool that copies or repairs a bundle may write a new table of files without knowing these digests: such a table is
believed when every file, hashed at once, proves it. Nothing else in a manifest can change unnoticed by accident. Who
means to forge one can of course compute the digests as well: compare the bundle's identity with one you trust.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

INTEGRITY = "integrity"
FILES = "files"
_SINGLE = {None: b"n", False: b"f", True: b"t"}


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the digests of what it holds; they stand before the table of files."""
    rest = {key: value for key, value in manifest.items() if key not in (INTEGRITY, FILES)}
    files = _digest(manifest.get(FILES))
    digests = {INTEGRITY: {"manifest": _manifest_digest(rest, files), "files": files}}
    return {**rest, **digests, **({FILES: manifest[FILES]} if FILES in manifest else {})}


def integrity_problem(manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with everything but the table of files; None if it is as it was written."""
    found = manifest.get(INTEGRITY)
    if not isinstance(found, Mapping) or found.keys() != {"manifest", "files"}:
        return f"expected an object {INTEGRITY!r} with the digests 'manifest' and 'files', found {found!r:.60}"
    rest = {key: value for key, value in manifest.items() if key not in (INTEGRITY, FILES)}
    digest = _manifest_digest(rest, found["files"])
    if digest != found["manifest"]:
        return f"its content has the digest {digest}, {INTEGRITY}.manifest says {found['manifest']!r:.80}"
    return None


def files_are_as_written(manifest: Mapping[str, Any]) -> bool:
    """Whether the table of files is the one the manifest was written with."""
    return _digest(manifest[FILES]) == manifest[INTEGRITY]["files"]


def _manifest_digest(rest: Mapping[str, Any], files_digest: object) -> str:
    return _digest({**rest, INTEGRITY: {"files": files_digest}})


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
