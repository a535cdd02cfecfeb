"""Snapshots as safetensors files; :mod:`crt_export.runtime.snapshot` describes what is in them."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from crt_export.errors import BundleError, CrtExportError, InputError

FORMAT = "crt-export snapshot"
FORMAT_VERSION = 1
_DTYPES = {"I64": "int64", "F32": "float32", "F16": "float16", "U8": "uint8"}


def save_snapshot(path: str | os.PathLike[str], bundle: str, target: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a file beside ``path``, sync it, and rename it.

    Raises:
        InputError: It cannot be written; what was at ``path`` is unchanged.
    """
    arrays = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "bundle": bundle,
        "target": target,
        "sha256": _digest(arrays),
    }
    final = _checked_path(path, InputError)
    if "\0" in str(final):
        raise InputError(f"cannot write the snapshot {str(final)!r}: a path must not hold a NUL byte")
    if not final.name:  # "", "." or "/"
        raise InputError(f"expected a file name to write the snapshot to, such as 'chat.snapshot', found {path!r}")
    partial = final.with_name(f".{final.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as stream:
            stream.write(save(arrays, metadata))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(final)
        _sync_folder(final.parent)
    except OSError as error:
        raise InputError(f"cannot write the snapshot {final}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def load_snapshot(path: str | os.PathLike[str]) -> tuple[str, str, dict[str, np.ndarray]]:
    """Read a file and compare its checksum; whether a session can use it, restore() finds out.

    Returns:
        Identity of the bundle, name of the target, tensors by name.

    Raises:
        BundleError: The file is missing, damaged, no snapshot, or of a newer format version.
    """
    file = _checked_path(path, BundleError)
    if "\0" in str(file):
        raise BundleError(f"expected a snapshot file, found a path with a NUL byte: {str(file)!r}")
    if not file.is_file():
        raise BundleError(f"expected a snapshot file, found {'a folder' if file.is_dir() else 'nothing'}: {file}")
    try:
        # safetensors itself refuses headers beyond 100 MB and tensors that overlap, leave gaps or pass the end.
        with safe_open(str(file), framework="np") as opened:
            metadata = _checked_metadata(file, opened.metadata())
            dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
            unknown = sorted(f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in _DTYPES)
            if unknown:
                known = ", ".join(_DTYPES)
                raise BundleError(f"{file} is not a snapshot: {'; '.join(unknown)}; a snapshot has {known} only")
            tensors = {name: opened.get_tensor(name) for name in sorted(dtypes)}
    except (SafetensorError, OSError, MemoryError, ValueError) as error:
        raise BundleError(f"{file} is not a snapshot or damaged: {error}") from error
    digest = _digest(tensors)
    if digest != metadata["sha256"]:
        raise BundleError(
            f"{file} is damaged: its tensors have SHA-256 {digest}, its metadata say {metadata['sha256']!r:.80}"
        )
    return metadata["bundle"], metadata["target"], tensors


def _checked_path(path: str | os.PathLike[str], kind: type[CrtExportError]) -> Path:
    try:
        found = Path(path)
        os.fsencode(found)
    except (TypeError, UnicodeError) as error:
        raise kind(f"expected the path of a snapshot file, found {path!r} ({error})") from error
    return found


def _checked_metadata(file: Path, metadata: Mapping[str, str] | None) -> Mapping[str, str]:
    found = metadata or {}
    if found.get("format") != FORMAT:
        raise BundleError(f"{file} is not a snapshot: its format is {found.get('format')!r:.80}, not {FORMAT!r}")
    version = found.get("format_version", "")
    if not (version.isascii() and version.isdigit() and int(version[:9]) >= 1):
        raise BundleError(f"{file} is not a snapshot: its format version is {version!r:.80}")
    if int(version[:9]) > FORMAT_VERSION:
        raise BundleError(
            f"{file} has format version {version:.20}; this version reads up to {FORMAT_VERSION}: upgrade crt-export"
        )
    missing = [key for key in ("bundle", "target", "sha256") if key not in found]
    if missing:
        raise BundleError(f"{file} is not a snapshot: its metadata lack {', '.join(missing)}")
    return found


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the rename last; not every file system can sync a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
