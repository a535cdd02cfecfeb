"""Safetensors files of this package: the same bytes for the same content, and nothing of a file is trusted.

Snapshots and self-test vectors are such files. Their metadata (strings) hold ``format``, ``format_version`` and
``sha256``, which is over the little-endian bytes of all tensors in order of their sorted names. The safetensors
library writes metadata in an order of its own, another one in every process; here they are sorted, so that equal
content gives equal files, in Python and in C++.

Everything a file says about itself is compared with its size before a byte of a tensor is read, and a tensor takes
memory only when it is asked for; ``engines/cpp/src/session/safetensors.cpp`` is the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from crt_export.errors import BundleError, InputError, problem_list
from crt_export.strict_json import parse_json
from crt_export.user_files import open_input

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 8 << 20  # 80,000 tensors; parsing takes many times the text's memory
_WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8}
_WIDTHS |= {"I64": 8, "U64": 8}
_MOST_DIMS = 32
_PIECE = 1 << 20
_DTYPES = {"I64": "int64", "F32": "float32", "F16": "float16", "U8": "uint8"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class _Place:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class StoredTensors:
    """The tensors of an open file, read one by one."""

    def __init__(self, stream: BinaryIO) -> None:
        """Read and check the header.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is no safetensors file, or its header and its size contradict each other.
        """
        self._stream = stream
        size = stream.seek(0, os.SEEK_END)
        header, self._begin = _header(stream, size)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ must be an object of texts")
        self.metadata: dict[str, str] = metadata
        self._places = {name: _place(name, entry) for name, entry in header.items()}
        _refuse_gaps(self._places, size - self._begin)

    @property
    def dtypes(self) -> dict[str, str]:
        """Name to dtype as the format spells it, such as ``F32``."""
        return {name: place.dtype for name, place in self._places.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape."""
        return {name: place.shape for name, place in self._places.items()}

    def digest(self) -> str:
        """SHA-256 of the bytes of all tensors in order of their sorted names, lower-case hex; in little memory."""
        digest = hashlib.sha256()
        for name in sorted(self._places):
            place = self._places[name]
            self._stream.seek(self._begin + place.begin)
            for begin in range(place.begin, place.end, _PIECE):
                digest.update(_exactly(self._stream, min(_PIECE, place.end - begin)))
        return digest.hexdigest()

    def tensor(self, name: str, dtype: str) -> np.ndarray:
        """The values of one tensor, read into the memory they stay in.

        Args:
            name: The tensor.
            dtype: numpy's word for its dtype.
        """
        place = self._places[name]
        values = np.empty(prod(place.shape), np.dtype(dtype).newbyteorder("<"))
        self._stream.seek(self._begin + place.begin)
        view = values.data.cast("B") if values.size else memoryview(b"")
        for begin in range(0, len(view), _PIECE):
            piece = view[begin : begin + _PIECE]
            if self._stream.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise ValueError("it became shorter while it was read")
        return values.astype(np.dtype(dtype), copy=False).reshape(place.shape)


def _header(stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header and where the data begins."""
    if size < _LENGTH_BYTES:
        raise ValueError(f"it has {size} bytes, not even the length of a header")
    stream.seek(0)
    (length,) = struct.unpack("<Q", _exactly(stream, _LENGTH_BYTES))
    if length > min(_MOST_HEADER_BYTES, size - _LENGTH_BYTES):
        raise ValueError(
            f"its header claims {length} bytes, the file has {size}, and a header at most {_MOST_HEADER_BYTES}"
        )
    header = parse_json(_exactly(stream, length))
    if not isinstance(header, dict):
        raise ValueError(f"its header must be a JSON object, found {header!r:.60}")
    return header, _LENGTH_BYTES + length


def _place(name: str, entry: Any) -> _Place:
    """One entry of the header; shape and offsets must tell the same size."""
    shown = f"{name!r:.80}"
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _WIDTHS:
        raise ValueError(f"{shown} has the dtype {dtype!r:.80}, which this version does not know")
    for key, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
            raise ValueError(f"{shown}: {key} must be a list of whole numbers of at least 0")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{shown}: data_offsets must be begin and end")
    if len(shape) > _MOST_DIMS or prod(shape) * _WIDTHS[dtype] != offsets[1] - offsets[0]:
        raise ValueError(f"{shown}: its shape and its offsets tell different sizes")
    return _Place(dtype=dtype, shape=tuple(shape), begin=offsets[0], end=offsets[1])


def _refuse_gaps(places: dict[str, _Place], data_bytes: int) -> None:
    """Tensors fill the rest of the file, without gap or overlap."""
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            raise ValueError(f"{name!r:.80} begins at byte {place.begin} of the data, expected {end}")
        end = place.end
    if end != data_bytes:
        raise ValueError(f"its tensors take {end} bytes, the file holds {data_bytes}")


def _exactly(stream: BinaryIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) != count:
        raise ValueError("it ends early, or became shorter while it was read")
    return content


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
