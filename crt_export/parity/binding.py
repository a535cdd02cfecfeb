"""A graph bound to buffers of its contract's shapes, caches updated in place as the deployed session does it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from crt_export.engine.base import BufferSlice
from crt_export.engine.onnxruntime import HostBuffer, OrtGraph
from crt_export.spec import GraphSpec, TensorSpec

Caches = Mapping[str, HostBuffer]


def new_caches(spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, HostBuffer]:
    """Zeroed buffers for every cache of a graph, by input name."""
    pasts = {past for _, past in spec.aliases}
    return {tensor.name: _buffer(tensor, sizes) for tensor in spec.inputs if tensor.name in pasts}


class BoundGraph:
    """Every input and output of one graph at fixed addresses and sizes."""

    def __init__(self, graph: OrtGraph, spec: GraphSpec, sizes: Mapping[str, int], caches: Caches) -> None:
        """Allocate what is not a cache and bind.

        Args:
            graph: The loaded file, which keeps the contract.
            spec: The contract.
            sizes: Size of every symbolic dim.
            caches: Shared between the graphs of a rollout; each is input and output at one address.
        """
        aliases = dict(spec.aliases)
        self._inputs = {t.name: caches[t.name] if t.name in caches else _buffer(t, sizes) for t in spec.inputs}
        self._outputs = {
            t.name: caches[aliases[t.name]] if t.name in aliases else _buffer(t, sizes) for t in spec.outputs
        }
        owned = [buffer for name, buffer in self._outputs.items() if name not in aliases]
        self._poisoned = [buffer.read() for buffer in owned if buffer.dtype.kind == "f"]
        self._launch = graph.bind(_rows(self._inputs), _rows(self._outputs))

    def run(self, **inputs: np.ndarray) -> None:
        """Set inputs and run; those not given keep their content, zeros at first.

        Raises:
            ContractError: ONNX Runtime failed, also where the graph delivers another shape than its contract.
        """
        self.set(**inputs)
        for output in self._poisoned:
            output.fill(
                np.nan
            )  # an output that the graph leaves unwritten must not be judged on the last call's content
        self._launch()

    def set(self, **inputs: np.ndarray) -> None:
        """Set inputs for the next run; those that this graph lacks (state of a plain transformer) are left out."""
        for name, values in inputs.items():
            if name in self._inputs:
                self._inputs[name].write(values)

    def read(self, name: str) -> np.ndarray:
        """An output; the next run overwrites it."""
        return self._outputs[name].read()

    def has(self, name: str) -> bool:
        """Whether the graph has such an output."""
        return name in self._outputs


def _buffer(tensor: TensorSpec, sizes: Mapping[str, int]) -> HostBuffer:
    return HostBuffer(tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims), tensor.dtype)


def _rows(buffers: Mapping[str, HostBuffer]) -> dict[str, BufferSlice]:
    return {name: BufferSlice(buffer, 0, buffer.shape[0]) for name, buffer in buffers.items()}
