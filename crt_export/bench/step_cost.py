"""The least that one step costs: the bytes it has to move and the operations it has to carry out.

Which weights an ONNX graph reads is found without importing onnx: a benchmark needs numpy and a runtime only. Of
onnx.proto the few messages on the way to initializers and nodes of the main graph are read; weights lie in another
file, so the graph itself is small.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from crt_export.bench.report import StepBytes
from crt_export.config import ModelConfig
from crt_export.errors import BundleError
from crt_export.protobuf import BYTES, VARINT, WireError, WireReader

_LOGIT_BYTES = 4  # float32 in every precision
_GRAPH = 7  # field numbers of onnx.proto
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OPERATOR = 1, 4
_TENSOR_DIMS, _TENSOR_DTYPE, _TENSOR_NAME = 1, 2, 8
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
        content = path.read_bytes()
        reader = WireReader(io.BytesIO(content))
        graphs = [_initializers(reader, end) for number, end in _messages(reader, len(content)) if number == _GRAPH]
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


def _initializers(reader: WireReader, end: int) -> tuple[Initializer, ...]:
    tables: set[str] = set()
    read: set[str] = set()
    tensors: list[tuple[str, tuple[int, ...], int]] = []
    for number, stop in _messages(reader, end):
        if number == _GRAPH_NODE:
            operator, inputs = _node(reader, stop)
            table = inputs[:1] if operator == "Gather" else []
            tables.update(table)
            read.update(inputs[len(table) :])
        elif number == _GRAPH_INITIALIZER:
            tensors.append(_tensor(reader, stop))
    return tuple(
        Initializer(name=name, dims=dims, bytes=(math.prod(dims) * bits + 7) // 8, gathered=name not in read)
        for name, dims, bits in tensors
        if name in read or name in tables
    )


def _node(reader: WireReader, end: int) -> tuple[str, list[str]]:
    operator, inputs = "", []
    for number, kind, length in reader.fields(end):
        if number == _NODE_INPUT and kind == BYTES:
            inputs.append(reader.text(length))
        elif number == _NODE_OPERATOR and kind == BYTES:
            operator = reader.text(length)
    return operator, inputs


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


def weight_bytes(initializers: Iterable[Initializer], batch: int) -> int:
    """Bytes of weights that a step reads: all of them once, of tables (embedding, rotary) one entry a row."""
    return sum(tensor.bytes_read(batch) for tensor in initializers)


def step_bytes(config: ModelConfig, *, weights: int, position: int, batch: int, cache_item_bytes: int) -> StepBytes:
    """Bytes that a step moves at least.

    Args:
        config: The model.
        weights: Bytes of weights, see :func:`weight_bytes`.
        position: Tokens in the cache before the step.
        batch: Rows.
        cache_item_bytes: Size of one element of the cache.
    """
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * cache_item_bytes
    cache = batch * attended(config, position) * entry
    logits = batch * config.vocab_size * _LOGIT_BYTES
    return StepBytes(weights=weights, cache=cache, logits=logits, total=weights + cache + logits)


def step_flops(config: ModelConfig, *, position: int, batch: int) -> int:
    """Floating point operations of a step, two for each multiply-add of a matrix product; the rest is negligible."""
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = 2 * config.num_attention_heads * config.head_dim * attended(config, position)
    layer = 4 * hidden * hidden + 2 * hidden * inner + attention
    correction = 2 * hidden * (config.correction_intermediate_size or 0) if config.recurrent else 0
    return 2 * batch * (config.num_hidden_layers * layer + correction + hidden * config.vocab_size)


def attended(config: ModelConfig, position: int) -> int:
    """Tokens that the token at a position sees, itself included."""
    used = position + 1
    return used if config.sliding_window is None else min(used, config.sliding_window)
