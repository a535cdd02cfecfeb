"""Snapshots as safetensors files; :mod:`crt_export.runtime.snapshot` describes what is in them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from crt_export.errors import BundleError, CrtExportError, InputError
from crt_export.runtime.counts import shown
from crt_export.runtime.tensor_file import TensorFileKind, read_tensor_file, tensor_file_bytes

SNAPSHOT = TensorFileKind(format="crt-export snapshot", version=1, title="a snapshot", required=("bundle", "target"))


def save_snapshot(path: str | os.PathLike[str], bundle: str, target: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a file beside ``path``, sync it, and rename it.

    Raises:
        InputError: It cannot be written; what was at ``path`` is unchanged.
    """
    final = _checked_path(path, InputError)
    if "\0" in str(final):
        raise InputError(f"cannot write the snapshot {str(final)!r}: a path must not hold a NUL byte")
    if not final.name:  # "", "." or "/"
        raise InputError(f"expected a file name to write the snapshot to, such as 'chat.snapshot', found {shown(path)}")
    content = tensor_file_bytes(SNAPSHOT, {"bundle": bundle, "target": target}, tensors)
    partial = final.with_name(f".{final.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as stream:
            stream.write(content)
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
    metadata, tensors = read_tensor_file(SNAPSHOT, file)
    return metadata["bundle"], metadata["target"], tensors


def _checked_path(path: str | os.PathLike[str], kind: type[CrtExportError]) -> Path:
    try:
        found = Path(path)
        os.fsencode(found)
    except (TypeError, UnicodeError) as error:
        raise kind(f"expected the path of a snapshot file, found {shown(path)} ({error})") from error
    return found


def _sync_folder(folder: Path) -> None:
    """Make the rename last; not every file system can sync a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
