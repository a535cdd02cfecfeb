"""The files an ONNX graph points at, found without importing onnx.

A runtime opens whatever path stands in a tensor's ``external_data``; so before a runtime may see a graph,
every such path is read here and compared with the manifest. The reader understands only the few messages of
onnx.proto (ONNX 1.23, IR version 14) on the way to a TensorProto, never holds more than one short string in
memory and skips everything else by seeking. Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from crt_export.errors import BundleError
from crt_export.user_files import open_input

_MAX_DEPTH = 100  # what protobuf itself allows
_MAX_STRING = 4096
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# message -> {field number: message of that field}; only fields through which a TensorProto can be reached
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
_TENSOR_NAME, _TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 8, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_EXTERNAL = 1  # TensorProto.DataLocation.EXTERNAL


@dataclass(frozen=True, kw_only=True)
class ExternalTensor:
    """A tensor whose data lies outside the graph file.

    Attributes:
        tensor: Name of the tensor, "" if it has none.
        location: Path of the data as the graph gives it, relative to the graph's folder; not checked here.
    """

    tensor: str
    location: str


def external_tensors(path: Path) -> tuple[ExternalTensor, ...]:
    """List the tensors of an ONNX file whose data lies in other files.

    Initializers, attributes, subgraphs, functions and training graphs are all searched.

    Args:
        path: The .onnx file.

    Returns:
        In file order, one entry per (tensor, location).

    Raises:
        BundleError: The file cannot be read, is not an ONNX protobuf, or has an external tensor without
            location.
    """
    try:
        stream = open_input(path, follow=False)
    except OSError as error:
        raise BundleError(f"cannot open the graph {path}: {error.strerror}") from error
    with stream:
        return external_tensors_of(stream, path)


def external_tensors_of(stream: BinaryIO, path: Path) -> tuple[ExternalTensor, ...]:
    """As :func:`external_tensors`, of a file that is open; ``path`` is what messages call it."""
    size = 0
    try:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        return tuple(_tensors_in(_WireReader(stream), "Model", size, 0))
    except _WireError as error:
        raise BundleError(
            f"{path} is not a usable ONNX file: {error} at byte {stream.tell()} of {size}; build the bundle again"
        ) from None
    except OSError as error:
        raise BundleError(f"cannot read the graph {path}: {error.strerror}") from error


class _WireError(Exception):
    """The bytes are not what a protobuf writer produces."""


class _WireReader:
    """Reads protobuf fields from a stream; never reads past ``end`` and never trusts a declared length."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.offset = 0

    def fields(self, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (field number, wire type, value or length) up to byte ``end``.

        For a length-delimited field the payload starts at ``self.offset``; what the consumer leaves unread is
        skipped.
        """
        while self.offset < end:
            tag = self.varint(end)
            number, wire_type = tag >> 3, tag & 7
            if tag > 0xFFFFFFFF or number == 0:
                raise _WireError(f"impossible field tag {tag}")
            if wire_type == _VARINT:
                yield number, wire_type, self.varint(end)
                continue
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire_type)
            if wire_type == _BYTES:
                length = self.varint(end)
            if length is None:
                raise _WireError(f"unsupported wire type {wire_type} in field {number}")
            if length > end - self.offset:
                raise _WireError(f"field {number} claims {length} bytes, {end - self.offset} are left")
            after = self.offset + length
            yield number, wire_type, length
            self.skip_to(after)

    def varint(self, end: int) -> int:
        """Read one variable-length integer of at most 64 bits."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self._stream.read(1) if self.offset < end else b""
            if not byte:
                raise _WireError("the file ends inside a number")
            self.offset += 1
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF
        raise _WireError("a number is longer than 10 bytes")

    def text(self, length: int) -> str:
        """Read a short UTF-8 string."""
        if length > _MAX_STRING:
            raise _WireError(f"a name or path of {length} bytes (at most {_MAX_STRING} are allowed)")
        content = self._stream.read(length)
        self.offset += len(content)
        if len(content) != length:
            raise _WireError("the file ends inside a string")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise _WireError("a name or path that is not UTF-8") from None

    def skip_to(self, offset: int) -> None:
        """Continue at ``offset``."""
        if offset != self.offset:
            self._stream.seek(offset)
            self.offset = offset


def _tensors_in(reader: _WireReader, message: str, end: int, depth: int) -> Iterator[ExternalTensor]:
    if depth > _MAX_DEPTH:
        raise _WireError(f"messages nested more than {_MAX_DEPTH} deep")
    children = _CHILDREN[message]
    for number, wire_type, length in reader.fields(end):
        child = children.get(number)
        if child is None or wire_type != _BYTES:
            continue
        if child == "Tensor":
            yield from _locations_of_tensor(reader, reader.offset + length)
        else:
            yield from _tensors_in(reader, child, reader.offset + length, depth + 1)


def _locations_of_tensor(reader: _WireReader, end: int) -> list[ExternalTensor]:
    name = ""
    external = False
    locations: list[str] = []
    for number, wire_type, value in reader.fields(end):
        if number == _TENSOR_NAME and wire_type == _BYTES:
            name = reader.text(value)
        elif number == _TENSOR_DATA_LOCATION and wire_type == _VARINT:
            external = value == _EXTERNAL
        elif number == _TENSOR_EXTERNAL_DATA and wire_type == _BYTES:
            key, text = _entry(reader, reader.offset + value)
            if key == "location":
                locations.append(text)
    if external and not locations:
        raise _WireError(f"tensor {name!r} is external but names no location")
    # A location counts even where data_location says "inline": runtimes differ in which of the two they obey.
    return [ExternalTensor(tensor=name, location=location) for location in locations]


def _entry(reader: _WireReader, end: int) -> tuple[str, str]:
    key = value = ""
    for number, wire_type, length in reader.fields(end):
        if wire_type == _BYTES and number == _ENTRY_KEY:
            key = reader.text(length)
        elif wire_type == _BYTES and number == _ENTRY_VALUE:
            value = reader.text(length)
    return key, value
