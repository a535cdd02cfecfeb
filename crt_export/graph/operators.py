"""The in-place cache update: a PyTorch operator, the cache that makes use of it, and its translation into a graph.

In a graph it is one ``TensorScatter`` per cache tensor (opset 24). TensorRT turns it into an in-place update of the
cache input; ONNX Runtime does so when input and output are bound to the same buffer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnxscript.onnx_opset import opset24
from torch import Tensor

from crt_export.cache import PassCache


@torch.library.custom_op("crt_export::cache_update", mutates_args=())
def cache_update(cache: Tensor, update: Tensor, position: Tensor) -> Tensor:
    """Write ``update`` [batch, heads, seq, head_dim] into a copy of ``cache`` [batch, heads, capacity, head_dim].

    Row b is written at ``position[b]`` .. ``position[b] + seq - 1``, which must lie inside the capacity.
    """
    seq = update.shape[2]
    index = position[:, None] + torch.arange(seq, device=cache.device)
    index = index[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
    return cache.scatter(2, index, update)


@cache_update.register_fake
def _(cache: Tensor, update: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(cache)


class ScatteredCache(PassCache):
    """Writes the new keys at ``position`` into caches of their capacity and attends over the result only.

    Reading the raw cache beside the in-place update would depend on execution order, so this cache is for the last pass
    of a graph; earlier passes use :class:`crt_export.cache.AppendedCache`, which only reads.
    """

    def _joined(self, past: Tensor, new: Tensor) -> Tensor:
        return cache_update(past, new, self._position)

    def _mask(self, window: int | None) -> Tensor:
        position = self._position
        slot = torch.arange(self._past[0][0].shape[2], device=position.device)
        query = position[:, None] + torch.arange(self._seq, device=position.device)
        seen = slot <= query[:, :, None]
        return (seen if window is None else seen & (query[:, :, None] - window < slot))[:, None]


def translation_table() -> dict[Callable[..., object], Callable[..., object]]:
    """The project's own PyTorch operators as nodes of a graph: ``torch.onnx.export(custom_translation_table=...)``."""
    operators = torch.ops.crt_export  # defined here and in crt_export.rotary
    return {
        operators.cache_update.default: _tensor_scatter,
        operators.rotary_embedding.default: _rotary_embedding,
    }


def _tensor_scatter(cache, update, position):
    return opset24.TensorScatter(cache, update, position, axis=-2, mode="linear")


def _rotary_embedding(x, cos, sin, interleaved: bool):
    return opset24.RotaryEmbedding(x, cos, sin, interleaved=int(interleaved))
