"""The least that one step costs: the bytes it has to move and the operations it has to carry out.

Which weights an ONNX graph reads is found without importing onnx: a benchmark needs numpy and a runtime only. Of
onnx.proto the few messages on the way to initializers and nodes of the main graph are read; weights lie in another
file, so the graph itself is small.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crt_export.bench.report import StepBytes
from crt_export.errors import BundleError
from crt_export.models.declaration import Carried, ModelInfo
from crt_export.protobuf import BYTES, VARINT, WireError, WireReader

_FLOAT_BYTES = 4  # logits and states are float32 in every precision
_GRAPH = 7  # field numbers of onnx.proto
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER = 1, 3
_TENSOR_DIMS, _TENSOR_DTYPE, _TENSOR_NAME = 1, 2, 8
#: Bits of an element by TensorProto.DataType.
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4,
}  # fmt: skip
#: Operators that multiply with a weight; one whose weight is packed says its size itself; and those that hand one on.
_PRODUCTS, _PACKED_PRODUCT = ("MatMul", "Gemm", "MatMulInteger"), "MatMulNBits"
_HANDED_ON = ("DequantizeLinear", "Cast", "Transpose", "Reshape")


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


@dataclass(frozen=True, kw_only=True)
class GraphWeights:
    """What a step graph does with its constants.

    Attributes:
        initializers: Those that its nodes read, in the file's order.
        multiplied: Elements of weights that a token is multiplied with; one that several products read counts for each.
    """

    initializers: tuple[Initializer, ...]
    multiplied: int

    def bytes_read(self, batch: int) -> int:
        """Bytes of weights that a step reads: all of them once, of tables (embedding, rotary) one entry a row."""
        return sum(tensor.bytes_read(batch) for tensor in self.initializers)


@dataclass(slots=True)
class _Node:
    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    integers: dict[str, int] = field(default_factory=dict)


def weights_from_graph(path: Path) -> GraphWeights:
    """Find what an ONNX graph reads of its constants.

    Raises:
        BundleError: The file cannot be read or is no ONNX graph.
    """
    try:
        content = path.read_bytes()
        reader = WireReader(io.BytesIO(content))
        graphs = [_weights(reader, end) for number, end in _messages(reader, len(content)) if number == _GRAPH]
        if len(graphs) != 1:
            raise WireError(f"{len(graphs)} graphs")
    except OSError as error:
        raise BundleError(f"cannot read the graph {path}: {error.strerror}") from error
    except WireError as error:
        raise BundleError(f"{path} is not a usable ONNX file ({error}); build the bundle again") from error
    return graphs[0]


def _messages(reader: WireReader, end: int) -> Iterator[tuple[int, int]]:
    """Field number and end of every field of a message that may be one itself."""
    for number, kind, length in reader.fields(end):
        if kind == BYTES:
            yield number, reader.offset + length


def _weights(reader: WireReader, end: int) -> GraphWeights:
    nodes: list[_Node] = []
    tensors: list[tuple[str, tuple[int, ...], int]] = []
    for number, stop in _messages(reader, end):
        if number == _GRAPH_NODE:
            nodes.append(_node(reader, stop))
        elif number == _GRAPH_INITIALIZER:
            tensors.append(_tensor(reader, stop))
    tables = {node.inputs[0] for node in nodes if node.operator == "Gather" and node.inputs}
    read = {name for node in nodes for name in node.inputs[node.operator == "Gather" :]}
    return GraphWeights(
        initializers=tuple(
            Initializer(name=name, dims=dims, bytes=(math.prod(dims) * bits + 7) // 8, gathered=name not in read)
            for name, dims, bits in tensors
            if name in read or name in tables
        ),
        multiplied=_multiplied(nodes, {name: math.prod(dims) for name, dims, _ in tensors if len(dims) > 1}),
    )


def _multiplied(nodes: Sequence[_Node], sizes: dict[str, int]) -> int:
    """Elements of the weights of every product; ``sizes`` are those of the constants of two dims or more."""
    total = 0
    for node in nodes:
        if node.operator == _PACKED_PRODUCT:
            total += node.integers.get("K", 0) * node.integers.get("N", 0)
        elif node.operator in _PRODUCTS:
            total += sum(sizes.get(name, 0) for name in node.inputs[:2])
        elif node.operator in _HANDED_ON and node.inputs and node.inputs[0] in sizes:
            sizes |= dict.fromkeys(node.outputs, sizes[node.inputs[0]])
    return total


def _node(reader: WireReader, end: int) -> _Node:
    node = _Node()
    for number, kind, length in reader.fields(end):
        if kind != BYTES:
            continue
        if number == _NODE_INPUT:
            node.inputs.append(reader.text(length))
        elif number == _NODE_OUTPUT:
            node.outputs.append(reader.text(length))
        elif number == _NODE_OPERATOR:
            node.operator = reader.text(length)
        elif number == _NODE_ATTRIBUTE:
            node.integers |= _integer(reader, reader.offset + length)
    return node


def _integer(reader: WireReader, end: int) -> dict[str, int]:
    """Name and value of an attribute that is an integer."""
    name, found = "", None
    for number, kind, value in reader.fields(end):
        if number == _ATTRIBUTE_NAME and kind == BYTES:
            name = reader.text(value)
        elif number == _ATTRIBUTE_INTEGER and kind == VARINT:
            found = value
    return {} if found is None else {name: found}


def _tensor(reader: WireReader, end: int) -> tuple[str, tuple[int, ...], int]:
    name, dims, bits = "", [], 0
    for number, kind, value in reader.fields(end):
        if number == _TENSOR_DIMS and kind == BYTES:  # packed
            stop = reader.offset + value
            while reader.offset < stop:
                dims.append(reader.varint(stop))
        elif number == _TENSOR_DIMS:
            dims.append(value)
        elif number == _TENSOR_DTYPE and kind == VARINT:
            if value not in _BITS:
                raise WireError(f"unknown data type {value}")
            bits = _BITS[value]
        elif number == _TENSOR_NAME and kind == BYTES:
            name = reader.text(value)
    return name, tuple(dims), bits


def step_bytes(model: ModelInfo, *, weights: int, position: int, batch: int, cache_item_bytes: int) -> StepBytes:
    """Bytes that a step moves at least.

    Args:
        model: The model.
        weights: Bytes of weights, see :meth:`GraphWeights.bytes_read`.
        position: Tokens in the cache before the step.
        batch: Rows.
        cache_item_bytes: Size of one element of the cache.
    """
    carried = model.carried
    cache = batch * cache_item_bytes * sum(spec.attended(position) * spec.width for spec in carried.caches)
    states = batch * _FLOAT_BYTES * sum(2 * spec.size for spec in carried.states)
    logits = batch * _FLOAT_BYTES * model.vocab_size
    total = weights + cache + states + logits
    return StepBytes(weights=weights, cache=cache, states=states, logits=logits, total=total)


def step_flops(carried: Carried, *, multiplied: int, position: int, batch: int) -> int:
    """Floating point operations of a step, two for each multiply-add of a matrix product; the rest is negligible.

    Args:
        carried: What the model carries.
        multiplied: Elements of weights that a token is multiplied with, see :class:`GraphWeights`.
        position: Tokens in the cache before the step.
        batch: Rows.
    """
    attention = sum(2 * spec.query_heads * spec.head_dim * spec.attended(position) for spec in carried.caches)
    return 2 * batch * (multiplied + attention)
