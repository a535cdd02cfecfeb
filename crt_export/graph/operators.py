"""The in-place cache update: a PyTorch operator, the cache that makes use of it, and its translation into a graph.

In a graph it is one ``TensorScatter`` per cache tensor (opset 24). TensorRT turns it into an in-place update of the
cache input; ONNX Runtime does so when input and output are bound to the same buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from onnxscript.onnx_opset import opset24
from torch import Tensor

from crt_export.cache import Attended
from crt_export.models.declaration import CacheSpec


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


class ScatteredCache:
    """Writes the new keys at ``position`` into the cache and attends over the result only.

    Reading the raw cache beside the in-place update would depend on execution order, so this cache is for the last pass
    of a graph; earlier passes use :class:`crt_export.cache.AppendedCache`, which only reads.

    Args:
        specs: What the caches are.
        past_keys: Per cache [batch, heads, capacity, head_dim].
        past_values: Likewise.
        position: Tokens already in the cache, int64 [batch].
        seq: Tokens of the chunk.
    """

    def __init__(
        self,
        specs: Sequence[CacheSpec],
        past_keys: Sequence[Tensor],
        past_values: Sequence[Tensor],
        position: Tensor,
        seq: int,
    ) -> None:
        self._specs = specs
        self._past = list(zip(past_keys, past_values, strict=True))
        self._position = position
        slot = torch.arange(past_keys[0].shape[2], device=position.device)
        query = position[:, None] + torch.arange(seq, device=position.device)
        seen = slot <= query[:, :, None]
        self._masks = {
            window: (seen if window is None else seen & (query[:, :, None] - window < slot))[:, None]
            for window in dict.fromkeys(spec.window for spec in specs)
        }
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def keys(self) -> list[Tensor]:
        return [self._written[index][0] for index in range(len(self._specs))]

    @property
    def values(self) -> list[Tensor]:
        return [self._written[index][1] for index in range(len(self._specs))]

    def extend(self, index: int, keys: Tensor, values: Tensor) -> Attended:
        past_keys, past_values = self._past[index]
        written = cache_update(past_keys, keys, self._position), cache_update(past_values, values, self._position)
        self._written[index] = written
        return Attended(*written, self._masks[self._specs[index].window])


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
