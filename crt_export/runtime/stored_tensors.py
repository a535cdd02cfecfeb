"""The safetensors format as this package reads it: a header of JSON, then the bytes of the tensors.

Everything a file says about itself is compared with its size before a byte of a tensor is read, and a tensor takes
memory only when it is asked for; ``engines/cpp/src/session/safetensors.cpp`` is the same.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import numpy as np

from crt_export.strict_json import parse_json

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 8 << 20  # 80,000 tensors; parsing takes many times the text's memory
_WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8}
_WIDTHS |= {"I64": 8, "U64": 8}
_MOST_DIMS = 32
_PIECE = 1 << 20


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
