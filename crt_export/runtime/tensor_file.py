"""Safetensors files of this package: the same bytes for the same content, and nothing of a file is trusted.

Snapshots and self-test vectors are such files. Their metadata (strings) hold ``format``, ``format_version`` and
``sha256``, which is over the little-endian bytes of all tensors in order of their sorted names. The safetensors
library writes metadata in an order of its own, another one in every process; here they are sorted, so that equal
content gives equal files, in Python and in C++.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crt_export.errors import BundleError, InputError, problem_list
from crt_export.input_file import open_input
from crt_export.runtime.stored_tensors import StoredTensors

_DTYPES = {"I64": "int64", "F32": "float32", "F16": "float16", "U8": "uint8"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class TensorFileKind:
    """What a file is, and which versions of it are read.

    Attributes:
        format: Metadata ``format``.
        version: Newest metadata ``format_version`` that this package reads, and the one it writes.
        title: What messages call such a file, with its article.
        required: Metadata that must be there besides ``format``, ``format_version`` and ``sha256``.
        problems: Finds what is wrong with the tensors' dtypes (numpy's words) and shapes, by name.
    """

    format: str
    version: int
    title: str
    required: tuple[str, ...]
    problems: Callable[[Mapping[str, tuple[str, tuple[int, ...]]]], list[str]] = lambda _: []


def tensor_file_bytes(kind: TensorFileKind, metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> bytes:
    """The content of a file.

    Args:
        kind: What it is.
        metadata: Its metadata but for ``format``, ``format_version`` and ``sha256``.
        tensors: int64, float32, float16 or uint8 by name.

    Raises:
        InputError: A tensor has another dtype.
    """
    arrays = {name: _little_endian(np.asarray(values)) for name, values in tensors.items()}
    unknown = [f"{name} is {values.dtype}" for name, values in arrays.items() if values.dtype.name not in _NAMES]
    if unknown:
        raise InputError(problem_list(f"{kind.title} has {', '.join(_NAMES)} only", unknown))
    every = {
        **metadata,
        "format": kind.format,
        "format_version": str(kind.version),
        "sha256": _digest(arrays),
    }
    header: dict[str, object] = {"__metadata__": dict(sorted(every.items()))}
    # As the safetensors library does: largest elements first, so that all stay aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    begin = 0
    for name in order:
        values = arrays[name]
        header[name] = {
            "dtype": _NAMES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [begin, begin + values.nbytes],
        }
        begin += values.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([struct.pack("<Q", len(text)), text, *(arrays[name].tobytes() for name in order)])


def read_tensor_file(
    kind: TensorFileKind, file: Path, content: bytes | None = None
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Read a file and compare its checksum; what the tensors are worth, the caller finds out.

    Dtypes and shapes are looked at before a tensor is read, and the checksum is compared before there is memory for
    any, so a file that claims much and holds nothing costs nothing; then the tensors take as much memory as the file
    has bytes.

    Args:
        kind: What it must be.
        file: The file.
        content: Its content, where that was read and checked before; None opens the file.

    Returns:
        Metadata, and tensors by name.

    Raises:
        BundleError: The file is missing, damaged, something else, or of a newer format version.
    """
    try:
        with io.BytesIO(content) if content is not None else open_input(file) as stream:
            stored = StoredTensors(stream)
            metadata = _checked_metadata(kind, file, stored.metadata)
            unknown = sorted(f"{name} is {dtype}" for name, dtype in stored.dtypes.items() if dtype not in _DTYPES)
            if unknown:
                known = ", ".join(_DTYPES)
                raise BundleError(f"{file} is not {kind.title}: {'; '.join(unknown)}; {kind.title} has {known} only")
            shapes = stored.shapes
            problems = kind.problems({name: (_DTYPES[dtype], shapes[name]) for name, dtype in stored.dtypes.items()})
            if problems:
                raise BundleError(problem_list(f"{file} is not {kind.title} of a session", problems))
            _refuse_other_digest(file, stored.digest(), metadata["sha256"])
            tensors = {name: stored.tensor(name, _DTYPES[dtype]) for name, dtype in sorted(stored.dtypes.items())}
    except (OSError, MemoryError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not {kind.title} or damaged: {error}") from error
    _refuse_other_digest(file, _digest(tensors), metadata["sha256"])  # the file may have been written to meanwhile
    return metadata, tensors


def _refuse_other_digest(file: Path, digest: str, expected: str) -> None:
    if digest != expected:
        raise BundleError(f"{file} is damaged: its tensors have SHA-256 {digest}, its metadata say {expected!r:.80}")


def _checked_metadata(kind: TensorFileKind, file: Path, found: dict[str, str]) -> dict[str, str]:
    if found.get("format") != kind.format:
        raise BundleError(f"{file} is not {kind.title}: its format is {found.get('format')!r:.80}, not {kind.format!r}")
    version = found.get("format_version", "")
    if not (version.isascii() and version.isdigit() and int(version[:9]) >= 1):
        raise BundleError(f"{file} is not {kind.title}: its format version is {version!r:.80}")
    if int(version[:9]) > kind.version:
        raise BundleError(
            f"{file} has format version {version:.20}; this version reads up to {kind.version}: upgrade crt-export"
        )
    missing = [key for key in (*kind.required, "sha256") if key not in found]
    if missing:
        raise BundleError(f"{file} is not {kind.title}: its metadata lack {', '.join(missing)}")
    return found


def _little_endian(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(values.shape)


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_little_endian(tensors[name]).data.cast("B") if tensors[name].size else b"")
    return digest.hexdigest()
