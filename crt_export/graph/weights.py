"""Write graphs that share their weights: one ``.onnx`` per graph, one weight file per precision.

Every weight goes into ``{precision}.weights`` as ONNX external data, at the same offset for every graph of a precision.
Scalars (activation scales) and the exporter's anonymous constants stay inside the .onnx file, where optimisers fold
them.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from crt_export.errors import BuildError
from crt_export.memo import memory_of

_SCALAR_BYTES = 8
#: Offsets are multiples of a page, so that runtimes can map a single tensor.
_ALIGNMENT = 4096


class Digests:
    """SHA-256 of tensors; memory that several of them share is hashed once, and kept."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[ir.TensorProtocol, str]] = {}

    def of(self, tensor: ir.TensorProtocol) -> str:
        """The digest in lower-case hex of a tensor that nobody writes to any more."""
        raw = tensor.raw
        key = memory_of(raw) if isinstance(raw, np.ndarray) else id(tensor)
        if key not in self._known:
            self._known[key] = (tensor, hashlib.sha256(_content(tensor)).hexdigest())
        return self._known[key][1]


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A weight file being read by several graphs.

    Attributes:
        path: The file; graphs lie in the same folder and refer to its bare name.
        entries: Per initializer name: offset and length in bytes, and SHA-256 of the bytes.
    """

    path: Path
    entries: Mapping[str, tuple[int, int, str]]
    _digests: Digests = field(repr=False, compare=False)


def write_weights(graphs: Mapping[str, ir.Model], path: Path) -> WeightFile:
    """Write every weight of the graphs once, in order of their names.

    Args:
        graphs: By graph name; equal initializer names must hold equal bytes.
        path: The weight file to write.

    Raises:
        BuildError: Two graphs hold different values under one name.
    """
    tensors: dict[str, ir.TensorProtocol] = {}
    hashes: dict[str, str] = {}
    digests = Digests()
    for graph_name, graph in graphs.items():
        for name, tensor in _external_tensors(graph).items():
            digest = digests.of(tensor)
            if hashes.setdefault(name, digest) != digest:
                raise BuildError(
                    f"{path.name}: weight {name} of graph {graph_name} differs from other graphs' of that name"
                )
            tensors.setdefault(name, tensor)
    entries: dict[str, tuple[int, int, str]] = {}
    with path.open("wb") as stream:
        for name in sorted(tensors):
            offset = -(-stream.tell() // _ALIGNMENT) * _ALIGNMENT
            stream.write(bytes(offset - stream.tell()))
            data = _content(tensors[name])
            stream.write(data)
            entries[name] = (offset, len(data), hashes[name])
    return WeightFile(path=path, entries=entries, _digests=digests)


def write_graph(graph: ir.Model, path: Path, weights: WeightFile) -> None:
    """Write one ``.onnx`` beside its weight file; the graph in memory keeps its own tensors.

    Raises:
        BuildError: A weight is not in the weight file, or has other bytes there.
    """
    originals: dict[str, ir.TensorProtocol] = {}
    for name, tensor in _external_tensors(graph).items():
        offset, length, digest = weights.entries.get(name, (0, -1, ""))
        if weights._digests.of(tensor) != digest:
            raise BuildError(f"{path.name}: weight {name} is not what {weights.path.name} holds under that name")
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
    try:
        ir.save(graph, path)
    finally:
        for name, tensor in originals.items():
            graph.graph.initializers[name].const_value = tensor


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
