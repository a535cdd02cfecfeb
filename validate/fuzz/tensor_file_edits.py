"""Damage to safetensors files: header length, offsets, dtypes, shapes, products that overflow, metadata, holes."""

from __future__ import annotations

import hashlib
import json
import struct
from random import Random
from typing import Any

from file_content import FileContent
from json_edits import change, json_text

_LENGTHS = (0, 1, 2, 7, 8, 9, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 9, 2**63, 2**64 - 9, 2**64 - 1)
_OFFSETS = (0, 1, -1, 8, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 1.0, "0", None, True)
_DTYPES = ("I64", "F32", "F16", "U8", "BF16", "BOOL", "F64", "I8", "U64", "F8_E5M2", "F4", "C64", "", "f32", None, 4)
_SIZES = (0, 1, 2, -1, 2**16, 2**31, 2**32, 2**33, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 1.5, None, "1")
_HOLES = (1, 1 << 20, 64 << 20, 3 << 30, 1 << 40)
#: A reader may hash what a header covers, which takes its time.
_COVERED_HOLES = (8, 1 << 20, 64 << 20, 256 << 20)
_PATTERNS = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x7f", b"\x00\x7c")


def edit_tensor_file(content: bytes, random: Random) -> FileContent:
    """Content with one change.

    Raises:
        ValueError: It has no readable header any more.
    """
    header, data = _parsed(content)
    return random.choice(_EDITS)(header, data, random)


def sign_tensor_file(content: FileContent) -> FileContent:
    """Content whose metadata hold the SHA-256 of its tensors, where that can be computed; else unchanged."""
    try:
        header, data = _parsed(content.data)
        digest = hashlib.sha256()
        for name in sorted(name for name in header if name != "__metadata__"):
            begin, end = header[name]["data_offsets"]
            digest.update(data[begin:end])
        header["__metadata__"]["sha256"] = digest.hexdigest()
        return FileContent(_bytes(json_text(header).encode("utf-8", "surrogatepass"), data).data, content.hole)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return content


def _parsed(content: bytes) -> tuple[dict[str, Any], bytes]:
    if len(content) < 8:
        raise ValueError("no header")
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return header, content[8 + length :]


def _bytes(text: bytes, data: bytes, length: int | None = None) -> FileContent:
    text += b" " * (-len(text) % 8)
    return FileContent(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _whole(header: dict[str, Any], data: bytes) -> FileContent:
    return _bytes(json_text(header).encode("utf-8", "surrogatepass"), data)


def _tensor(header: dict[str, Any], random: Random) -> dict[str, Any]:
    entries = [entry for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]
    if not entries:
        raise ValueError("the header has no tensor")
    return random.choice(entries)


def _header_length(header: dict[str, Any], data: bytes, random: Random) -> FileContent:
    text = json_text(header).encode("utf-8", "surrogatepass")
    return _bytes(text, data, random.choice((*_LENGTHS, len(text) + 8 + len(data), len(text) - 1)))


def _header_json(header: dict[str, Any], data: bytes, random: Random) -> FileContent:
    return _whole(change(header, random), data)


def _offsets(header: dict[str, Any], data: bytes, random: Random) -> FileContent:
    """Overlaps, gaps, ends before begins, ends behind the file."""
    entry, other = _tensor(header, random), _tensor(header, random)
    begin, end = entry.get("data_offsets", [0, 0])
    theirs = other.get("data_offsets", [0, 0])
    entry["data_offsets"] = random.choice(
        (theirs, [end, begin], [begin, begin], [begin, end - 1], [begin, len(data)], [begin, len(data) + 1], [begin],
         [begin, end, end], [random.choice(_OFFSETS), end], [begin, random.choice(_OFFSETS)], [0, 0])
    )  # fmt: skip
    return _whole(header, data)


def _dtype(header: dict[str, Any], data: bytes, random: Random) -> FileContent:
    _tensor(header, random)["dtype"] = random.choice(_DTYPES)
    return _whole(header, data)


def _shape(header: dict[str, Any], data: bytes, random: Random) -> FileContent:
    entry = _tensor(header, random)
    shape = list(entry.get("shape") or [])
    one = random.choice(_SIZES)
    entry["shape"] = random.choice(
        ([], [one], [*shape, 1], [1, *shape], [*shape, 0], shape[::-1], shape[:-1], [*shape[:-1], one], [2**32, 2**32],
         [2**63, 2], [0, 2**62, 2**62], [1] * 40, [1] * 5000)
    )  # fmt: skip
    return _whole(header, data)


def _metadata(header: dict[str, Any], data: bytes, random: Random) -> FileContent:
    entries = header.get("__metadata__")
    if not isinstance(entries, dict) or not entries:
        header["__metadata__"] = random.choice((None, [], {}, {"format": "pt"}))
        return _whole(header, data)
    key = random.choice(sorted(entries))
    entries[key] = random.choice(
        ("", "0", "1", "2", "-1", "01", "1.0", "١", "9" * 30, "9" * 5000, "x", "{}", "null", "[" * 3000, "\x1b[2J", 1,
         None, str(entries[key]).upper(), str(entries[key])[:-1], '{"fp32": NaN}', '{"fp32": 1e400}', '{"fp32": 0}')
    )  # fmt: skip
    return _whole(header, data)


def _names(header: dict[str, Any], data: bytes, random: Random) -> FileContent:
    """A tensor under another name, dropped, or of no bytes."""
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header.pop(name)
    new = random.choice(("", "x" * 5000, "\0", "../x", name + " ", name.upper(), random.choice(names), "position"))
    if random.random() < 0.7:
        header[new] = entry
    return _whole(header, data)


def _values(header: dict[str, Any], data: bytes, random: Random) -> FileContent:
    """NaN, infinity, and whole numbers at the ends of their range, somewhere in a tensor."""
    begin, end = _tensor(header, random).get("data_offsets", [0, 0])
    pattern = random.choice(_PATTERNS)
    steps = (end - begin) // len(pattern)
    at = begin + len(pattern) * (random.randrange(steps) if steps > 0 else 0)
    return _whole(header, data[:at] + pattern + data[at + len(pattern) :])


def _size(header: dict[str, Any], data: bytes, random: Random) -> FileContent:
    """Fewer bytes than the header says, or more."""
    return _whole(header, random.choice((b"", data[:-1], data[: len(data) // 2], data + b"\0", data + data)))


def _hole(header: dict[str, Any], data: bytes, random: Random) -> FileContent:
    """A file that is far larger than its bytes, or one with a tensor that covers the hole."""
    if random.random() < 0.5:
        return FileContent(_whole(header, data).data, random.choice(_HOLES))
    dtype, width = random.choice((("U8", 1), ("F32", 4), ("I64", 8)))
    hole = random.choice(_COVERED_HOLES)
    header["hole"] = {"dtype": dtype, "shape": [hole // width], "data_offsets": [len(data), len(data) + hole]}
    return FileContent(_whole(header, data).data, hole)


_EDITS = (
    _header_length, _header_json, _header_json, _offsets, _offsets, _dtype, _shape, _shape, _metadata, _names, _values,
    _values, _size, _hole,
)  # fmt: skip
