"""Cache of a model in PyTorch: keys and values of past tokens plus those of the chunk at hand.

A cache is made for one pass. ``extend`` takes a layer's new keys and values, [batch, heads, seq, head_dim], and returns
all keys and values to attend over; ``mask`` says which of them each query sees (None: all); ``keys`` and ``values``
then hold, per layer, what the next chunk continues from. With an attention ``window`` of W (``sliding_window`` of the
configuration) a query at position p sees the keys at p - W + 1 to p, itself included; None lets it see all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """Keys and values for one pass, see the module."""

    @property
    def mask(self) -> Tensor | None:
        """Bool [batch, 1, seq, keys], True = attend; None: every query sees every key."""
        ...

    @property
    def keys(self) -> Sequence[Tensor]:
        """Per layer, what the next chunk continues from, [batch, heads, past, head_dim]."""
        ...

    @property
    def values(self) -> Sequence[Tensor]:
        """Like ``keys``."""
        ...

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one layer's new keys and values; returns all of them, past first."""
        ...


class AppendedCache:
    """Puts the new keys behind the cached ones and leaves the cache itself as it was.

    Args:
        past_keys: Per layer [batch, heads, past, head_dim]; entries at and beyond ``position`` are not attended.
        past_values: Likewise.
        position: Valid entries of the past per row, int64 [batch].
        seq: Tokens of the chunk, causal among themselves.
        window: Keys that a query sees, itself included; None: all.
    """

    def __init__(
        self,
        past_keys: Sequence[Tensor],
        past_values: Sequence[Tensor],
        position: Tensor,
        seq: int,
        window: int | None = None,
    ) -> None:
        self._past = list(zip(past_keys, past_values, strict=True))
        past = past_keys[0].shape[2]
        index = torch.arange(seq, device=position.device)
        slot = torch.arange(past, device=position.device)
        seen = (slot < position[:, None])[:, None, None, :]
        causal = (index <= index[:, None])[None, None]
        if window is not None:
            query = position[:, None] + index
            seen = seen & (query[:, :, None] - window < slot)[:, None]
            causal = causal & (index[:, None] - window < index)[None, None]
        batch = position.shape[0]
        self.mask: Tensor | None = torch.cat(
            [seen.expand(batch, 1, seq, past), causal.expand(batch, 1, seq, seq)], dim=-1
        )
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        past_keys, past_values = self._past[layer]
        self.keys.append(torch.cat([past_keys, keys], dim=2))
        self.values.append(torch.cat([past_values, values], dim=2))
        return self.keys[-1], self.values[-1]


class GrowingCache:
    """Room for ``seq`` more tokens, filled one token a call without copying; needs no mask. Inference only."""

    def __init__(
        self, past_keys: Sequence[Tensor], past_values: Sequence[Tensor], seq: int, window: int | None = None
    ) -> None:
        self.mask: Tensor | None = None
        self._window = window
        self._used = [tensor.shape[2] for tensor in past_keys]
        self._keys = [self._with_room(tensor, seq) for tensor in past_keys]
        self._values = [self._with_room(tensor, seq) for tensor in past_values]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self._used[layer], self._used[layer] + keys.shape[2]
        self._keys[layer][:, :, start:end] = keys
        self._values[layer][:, :, start:end] = values
        self._used[layer] = end
        first = 0 if self._window is None else max(0, end - self._window)
        return self._keys[layer][:, :, first:end], self._values[layer][:, :, first:end]

    @property
    def keys(self) -> list[Tensor]:
        return [tensor[:, :, :used] for tensor, used in zip(self._keys, self._used, strict=True)]

    @property
    def values(self) -> list[Tensor]:
        return [tensor[:, :, :used] for tensor, used in zip(self._values, self._used, strict=True)]

    @staticmethod
    def _with_room(past: Tensor, seq: int) -> Tensor:
        room = past.new_zeros(*past.shape[:2], seq, past.shape[3])
        return torch.cat([past, room], dim=2)
