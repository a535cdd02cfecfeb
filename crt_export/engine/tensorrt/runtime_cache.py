"""Kernels that TensorRT-RTX compiled on this machine, kept in the user's cache folder for the next process.

Nothing depends on it: a cache that cannot be read, is damaged or does not fit is as good as none, and one that
cannot be written is lost. A damaged file never reaches the runtime: it begins with the hash of what follows.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from crt_export.user_files import read_input, write_file

_MAGIC = b"crt-export tensorrt-rtx cache 1\n"
#: As in the C++ library.
_MOST_BYTES = 2**30
_HASH_BYTES = hashlib.sha256().digest_size


def cache_path(name: str) -> Path | None:
    """Where the cache of this name lies: in $XDG_CACHE_HOME or ~/.cache; None where there is no home folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification: a relative path is to be ignored.
        base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # no home folder can be told
        return None
    return base / "crt-export" / "tensorrt-rtx" / f"{name}.cache"


def read_cache(path: Path | None) -> bytes | None:
    """What :func:`write_cache` wrote; None if there is nothing or it is damaged."""
    if path is None:
        return None
    try:
        content = read_input(path, most=_MOST_BYTES)
    except OSError:
        return None
    head, body = content[: len(_MAGIC) + _HASH_BYTES], content[len(_MAGIC) + _HASH_BYTES :]
    return body if head == _MAGIC + hashlib.sha256(body).digest() else None


def write_cache(path: Path | None, body: bytes) -> bool:
    """Replace the file in one step, readable by its owner only; False if that was not possible or not needed."""
    if path is None or not body or read_cache(path) == body:
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(path, _MAGIC + hashlib.sha256(body).digest() + body, mode=0o600)
    except OSError:
        return False
    return True
