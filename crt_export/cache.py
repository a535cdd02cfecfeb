"""Cache of a model in PyTorch: keys and values of past tokens plus those of the chunk at hand.

A cache is made for one pass. ``extend`` takes the new keys and values of one cache, [batch, heads, seq, head_dim], and
returns all keys and values to attend over and which of them each query sees; ``keys`` and ``values`` then hold, per
cache, what the next chunk continues from. Extended again in the same pass, a cache replaces what this pass wrote. With
an attention window of W a query at position p sees the keys at p - W + 1 to p, itself included; None lets it see all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from crt_export.models.declaration import CacheSpec


class Attended(NamedTuple):
    """What queries attend over.

    Attributes:
        keys: [batch, heads, past and chunk, head_dim].
        values: Likewise.
        mask: Bool [batch, 1, seq, keys], True = attend; None: every query sees every key.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None


class Cache(Protocol):
    """Keys and values for one pass, see the module."""

    @property
    def keys(self) -> Sequence[Tensor]:
        """Per cache, what the next chunk continues from, [batch, heads, past, head_dim]."""
        ...

    @property
    def values(self) -> Sequence[Tensor]:
        """Like ``keys``."""
        ...

    def extend(self, index: int, keys: Tensor, values: Tensor) -> Attended:
        """Add new keys and values to the cache of that number, behind what it came in with."""
        ...


class PassCache(ABC):
    """Base of caches over all positions of a chunk at once: what each came in with is read, and written once a pass.

    Args:
        specs: What the caches are.
        past_keys: Per cache [batch, heads, past, head_dim]; entries at and beyond ``position`` are not attended.
        past_values: Likewise.
        position: Valid entries of the past per row, int64 [batch].
        seq: Tokens of the chunk, causal among themselves.
    """

    def __init__(
        self,
        specs: Sequence[CacheSpec],
        past_keys: Sequence[Tensor],
        past_values: Sequence[Tensor],
        position: Tensor,
        seq: int,
    ) -> None:
        self._specs, self._position, self._seq = specs, position, seq
        self._past = list(zip(past_keys, past_values, strict=True))
        self._masks = {window: self._mask(window) for window in dict.fromkeys(spec.window for spec in specs)}
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def keys(self) -> list[Tensor]:
        return [self._written[index][0] for index in range(len(self._specs))]

    @property
    def values(self) -> list[Tensor]:
        return [self._written[index][1] for index in range(len(self._specs))]

    def extend(self, index: int, keys: Tensor, values: Tensor) -> Attended:
        past_keys, past_values = self._past[index]
        self._written[index] = self._joined(past_keys, keys), self._joined(past_values, values)
        return Attended(*self._written[index], self._masks[self._specs[index].window])

    @abstractmethod
    def _joined(self, past: Tensor, new: Tensor) -> Tensor:
        """The past and what this chunk adds, [batch, heads, keys, head_dim]."""

    @abstractmethod
    def _mask(self, window: int | None) -> Tensor:
        """Which of them each query sees, bool [batch, 1, seq, keys]."""


class AppendedCache(PassCache):
    """Puts the new keys behind the cached ones and leaves the cache itself as it was."""

    def _joined(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([past, new], dim=2)

    def _mask(self, window: int | None) -> Tensor:
        position, seq, past = self._position, self._seq, self._past[0][0].shape[2]
        index = torch.arange(seq, device=position.device)
        slot = torch.arange(past, device=position.device)
        seen = (slot < position[:, None])[:, None, None, :]
        causal = (index <= index[:, None])[None, None]
        if window is not None:
            query = position[:, None] + index
            seen = seen & (query[:, :, None] - window < slot)[:, None]
            causal = causal & (index[:, None] - window < index)[None, None]
        batch = position.shape[0]
        return torch.cat([seen.expand(batch, 1, seq, past), causal.expand(batch, 1, seq, seq)], dim=-1)


class GrowingCache:
    """Room for ``seq`` more tokens, filled one token a pass without copying; needs no mask. Inference only."""

    def __init__(
        self, specs: Sequence[CacheSpec], past_keys: Sequence[Tensor], past_values: Sequence[Tensor], seq: int
    ) -> None:
        self._specs = specs
        self._used = past_keys[0].shape[2]
        self._keys = [self._with_room(tensor, seq) for tensor in past_keys]
        self._values = [self._with_room(tensor, seq) for tensor in past_values]

    def extend(self, index: int, keys: Tensor, values: Tensor) -> Attended:
        end = self._used + 1
        self._keys[index][:, :, self._used : end] = keys
        self._values[index][:, :, self._used : end] = values
        window = self._specs[index].window
        first = 0 if window is None else max(0, end - window)
        return Attended(self._keys[index][:, :, first:end], self._values[index][:, :, first:end], None)

    def advance(self) -> None:
        """Go on to the next token's pass."""
        self._used += 1

    @property
    def keys(self) -> list[Tensor]:
        return [tensor[:, :, : self._used] for tensor in self._keys]

    @property
    def values(self) -> list[Tensor]:
        return [tensor[:, :, : self._used] for tensor in self._values]

    @staticmethod
    def _with_room(past: Tensor, seq: int) -> Tensor:
        room = past.new_zeros(*past.shape[:2], seq, past.shape[3])
        return torch.cat([past, room], dim=2)
