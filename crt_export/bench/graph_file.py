"""Which weights an ONNX graph reads, without importing onnx: a benchmark needs numpy and a runtime only.

Reads the few messages of onnx.proto on the way to initializers and nodes of the main graph; wire format:
https://protobuf.dev/programming-guides/encoding/. Weights lie in another file, so the graph itself is small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crt_export.errors import BundleError

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OPERATOR = 1, 4
_TENSOR_DIMS, _TENSOR_DTYPE, _TENSOR_NAME = 1, 2, 8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
#: Bits of an element by TensorProto.DataType.
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """A constant tensor of a graph.

    Attributes:
        name: Its name.
        dims: Its shape.
        bytes: Its size, wherever its data lies.
        gathered: It is only ever the table of a Gather, which reads the rows of the tokens and nothing else.
    """

    name: str
    dims: tuple[int, ...]
    bytes: int
    gathered: bool

    def bytes_read(self, rows: int) -> int:
        """Bytes that a call reads of it that looks up this many rows."""
        if not self.gathered or not self.dims or self.dims[0] == 0:
            return self.bytes
        return min(rows, self.dims[0]) * (self.bytes // self.dims[0])


def initializers_from_graph(path: Path) -> tuple[Initializer, ...]:
    """List the constants that the nodes of an ONNX graph read, in the file's order.

    Raises:
        BundleError: The file cannot be read or is no ONNX graph.
    """
    try:
        content = memoryview(path.read_bytes())
        graphs = [
            value for number, value in _fields(content) if number == _MODEL_GRAPH and isinstance(value, memoryview)
        ]
        if len(graphs) != 1:
            raise ValueError(f"{len(graphs)} graphs")
        return _initializers(graphs[0])
    except OSError as error:
        raise BundleError(f"cannot read the graph {path}: {error.strerror}") from error
    except (ValueError, IndexError, KeyError) as error:
        raise BundleError(f"{path} is not a usable ONNX file ({error}); build the bundle again") from error


def _initializers(graph: memoryview) -> tuple[Initializer, ...]:
    tables: set[str] = set()
    read: set[str] = set()
    tensors: list[tuple[str, tuple[int, ...], int]] = []
    for number, value in _fields(graph):
        if number == _GRAPH_NODE and isinstance(value, memoryview):
            operator, inputs = _node(value)
            table = inputs[:1] if operator == "Gather" else []
            tables.update(table)
            read.update(inputs[len(table) :])
        elif number == _GRAPH_INITIALIZER and isinstance(value, memoryview):
            tensors.append(_tensor(value))
    return tuple(
        Initializer(name=name, dims=dims, bytes=(math.prod(dims) * bits + 7) // 8, gathered=name not in read)
        for name, dims, bits in tensors
        if name in read or name in tables
    )


def _node(message: memoryview) -> tuple[str, list[str]]:
    operator, inputs = "", []
    for number, value in _fields(message):
        if number == _NODE_INPUT and isinstance(value, memoryview):
            inputs.append(bytes(value).decode())
        elif number == _NODE_OPERATOR and isinstance(value, memoryview):
            operator = bytes(value).decode()
    return operator, inputs


def _tensor(message: memoryview) -> tuple[str, tuple[int, ...], int]:
    name, dims, bits = "", [], 0
    for number, value in _fields(message):
        if number == _TENSOR_DIMS:
            dims += list(_packed(value)) if isinstance(value, memoryview) else [value]
        elif number == _TENSOR_DTYPE and isinstance(value, int):
            bits = _BITS[value]
        elif number == _TENSOR_NAME and isinstance(value, memoryview):
            name = bytes(value).decode()
    return name, tuple(dims), bits


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, number or bytes) of one message.

    Raises:
        ValueError, IndexError: The bytes are not what a protobuf writer produces.
    """
    offset = 0
    while offset < len(message):
        tag, offset = _varint(message, offset)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, offset = _varint(message, offset)
            yield number, value
            continue
        if wire_type == _BYTES:
            length, offset = _varint(message, offset)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}[wire_type]
        if length > len(message) - offset:
            raise ValueError(f"a field claims {length} bytes, {len(message) - offset} are left")
        yield number, message[offset : offset + length]
        offset += length


def _packed(message: memoryview) -> Iterator[int]:
    offset = 0
    while offset < len(message):
        value, offset = _varint(message, offset)
        yield value


def _varint(message: memoryview, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise ValueError("a number is longer than 10 bytes")
