"""Graphs that share their weights on disk: one ``.onnx`` per graph, one weight file per precision.

Every weight goes into ``{precision}.weights`` as ONNX external data, at the same offset for every graph of a precision.
Scalars (activation scales) and the exporter's anonymous constants stay inside the .onnx file, where optimisers fold
them. A file is hashed while it is written.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from crt_export.errors import BuildError

_SCALAR_BYTES = 8
#: Offsets are multiples of a page, so that runtimes can map a single tensor.
_ALIGNMENT = 4096

Arrays = tuple[NDArray[np.generic], ...]


class SharedArrays:
    """What was made of which arrays that several graphs have in common.

    An array is known by the memory it lies in, which is kept as long as this is.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Sequence[NDArray[np.generic]], Arrays]] = {}

    def made(self, how: Hashable, sources: Sequence[NDArray[np.generic]], make: Callable[[], Arrays]) -> Arrays:
        """The arrays that ``make`` makes of ``sources``; it is called once for the same ones.

        Args:
            how: Name of the function, and its other arguments.
            sources: What it reads, and nobody writes to.
            make: The function.
        """
        key = (how, *(memory_of(array) for array in sources))
        if key not in self._made:
            self._made[key] = (sources, make())
        return self._made[key][1]


def memory_of(array: NDArray[np.generic]) -> Hashable:
    """Where an array lies and how it is read: equal for two that will always hold the same values."""
    return (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str)


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A weight file that several graphs read.

    Attributes:
        path: The file; graphs lie in the same folder and refer to its bare name.
        entries: Per initializer name: offset and length in bytes.
        sha256: Of the file, lower-case hex.
    """

    path: Path
    entries: Mapping[str, tuple[int, int]]
    sha256: str
    _tensors: Mapping[str, ir.TensorProtocol] = field(repr=False, compare=False)


def write_weights(graphs: Mapping[str, ir.Model], path: Path) -> WeightFile:
    """Write every weight of the graphs once, in order of their names.

    Args:
        graphs: By graph name; equal initializer names must hold equal bytes.
        path: The weight file to write.

    Raises:
        BuildError: Two graphs hold different values under one name.
    """
    tensors: dict[str, ir.TensorProtocol] = {}
    for graph_name, graph in graphs.items():
        for name, tensor in _external_tensors(graph).items():
            if not _same_bytes(tensors.setdefault(name, tensor), tensor):
                raise BuildError(
                    f"{path.name}: weight {name} of graph {graph_name} differs from other graphs' of that name"
                )
    entries: dict[str, tuple[int, int]] = {}
    digest, end = hashlib.sha256(), 0
    with path.open("wb") as stream:
        for name in sorted(tensors):
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            data = _content(tensors[name])
            entries[name] = (offset, len(data))
            for part in (bytes(offset - end), data):
                digest.update(part)
                stream.write(part)
            end = offset + len(data)
    return WeightFile(path=path, entries=entries, sha256=digest.hexdigest(), _tensors=tensors)


def write_graph(graph: ir.Model, path: Path, weights: WeightFile) -> str:
    """Write one ``.onnx`` beside its weight file; the graph in memory keeps its own tensors.

    Returns:
        SHA-256 of the file, lower-case hex.

    Raises:
        BuildError: A weight is not in the weight file, or has other bytes there.
    """
    originals: dict[str, ir.TensorProtocol] = {}
    try:
        for name, tensor in _external_tensors(graph).items():
            if name not in weights.entries or not _same_bytes(weights._tensors[name], tensor):
                raise BuildError(f"{path.name}: weight {name} is not what {weights.path.name} holds under that name")
            offset, length = weights.entries[name]
            originals[name] = tensor
            graph.graph.initializers[name].const_value = ir.ExternalTensor(
                weights.path.name,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=path.parent,
            )
        return save_graph(graph, path)
    finally:
        for name, tensor in originals.items():
            graph.graph.initializers[name].const_value = tensor


def save_graph(graph: ir.Model, path: Path) -> str:
    """Write a graph whose weights, if any are external, lie where they are; SHA-256 of the file, lower-case hex."""
    content = ir.to_proto(graph).SerializeToString()
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _same_bytes(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    """Whether two tensors hold the same bytes; what shares its memory is not read."""
    left, right = (np.frombuffer(_content(tensor), np.uint8) for tensor in (one, other))
    return memory_of(left) == memory_of(right) or np.array_equal(left, right)


def _external_tensors(graph: ir.Model) -> dict[str, ir.TensorProtocol]:
    return {
        name: value.const_value
        for name, value in graph.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > _SCALAR_BYTES and is_weight(name)
    }


def _content(tensor: ir.TensorProtocol) -> memoryview | bytes:
    """The bytes of a tensor as ONNX stores them, without a copy where memory holds them so."""
    raw = tensor.raw
    plain = isinstance(raw, np.ndarray) and raw.flags.c_contiguous and raw.nbytes == tensor.nbytes
    if not plain or sys.byteorder != "little":
        return tensor.tobytes()
    return raw.reshape(-1).view(np.uint8).data


def is_weight(name: str) -> bool:
    """Whether an initializer is a weight or table of the model (``layers.0.attn.q.weight``, ``rope_cos``)."""
    return "." in name or name.startswith("rope_")
