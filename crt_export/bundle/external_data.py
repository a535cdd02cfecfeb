"""The files an ONNX graph points at, found without importing onnx.

A runtime opens whatever path stands in a tensor's ``external_data``; so before a runtime may see a graph,
every such path is read here and compared with the manifest. The reader understands only the few messages of
onnx.proto (ONNX 1.23, IR version 14) on the way to a TensorProto.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from crt_export.errors import BundleError
from crt_export.protobuf import BYTES, VARINT, WireError, WireReader
from crt_export.user_files import open_input

_MAX_DEPTH = 100  # what protobuf itself allows

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
        return tuple(_tensors_in(WireReader(stream), "Model", size, 0))
    except WireError as error:
        raise BundleError(
            f"{path} is not a usable ONNX file: {error} at byte {stream.tell()} of {size}; build the bundle again"
        ) from None
    except OSError as error:
        raise BundleError(f"cannot read the graph {path}: {error.strerror}") from error


def _tensors_in(reader: WireReader, message: str, end: int, depth: int) -> Iterator[ExternalTensor]:
    if depth > _MAX_DEPTH:
        raise WireError(f"messages nested more than {_MAX_DEPTH} deep")
    children = _CHILDREN[message]
    for number, wire_type, length in reader.fields(end):
        child = children.get(number)
        if child is None or wire_type != BYTES:
            continue
        if child == "Tensor":
            yield from _locations_of_tensor(reader, reader.offset + length)
        else:
            yield from _tensors_in(reader, child, reader.offset + length, depth + 1)


def _locations_of_tensor(reader: WireReader, end: int) -> list[ExternalTensor]:
    name = ""
    external = False
    locations: list[str] = []
    for number, wire_type, value in reader.fields(end):
        if number == _TENSOR_NAME and wire_type == BYTES:
            name = reader.text(value)
        elif number == _TENSOR_DATA_LOCATION and wire_type == VARINT:
            external = value == _EXTERNAL
        elif number == _TENSOR_EXTERNAL_DATA and wire_type == BYTES:
            key, text = _entry(reader, reader.offset + value)
            if key == "location":
                locations.append(text)
    if external and not locations:
        raise WireError(f"tensor {name!r} is external but names no location")
    # A location counts even where data_location says "inline": runtimes differ in which of the two they obey.
    return [ExternalTensor(tensor=name, location=location) for location in locations]


def _entry(reader: WireReader, end: int) -> tuple[str, str]:
    key = value = ""
    for number, wire_type, length in reader.fields(end):
        if wire_type == BYTES and number == _ENTRY_KEY:
            key = reader.text(length)
        elif wire_type == BYTES and number == _ENTRY_VALUE:
            value = reader.text(length)
    return key, value
