"""Slide of a full row along the attention window: what a session that evicts keeps, and how its keys are turned.

A full row of a session that evicts forgets what the attention window no longer sees. A model with an attention window
of W sees the latest W keys, the token itself included, so W - 1 cached tokens are all that a further token needs. A row
that is full keeps those: its cache entries move to the front, and every key is turned back by as many positions as it
moved. Rotary embedding is relative (a key rotated for position p and turned back by s is the key of position p - s, up
to rounding), so the row goes on as if the forgotten tokens had never been counted, and its positions stay within the
model's rotary tables for ever.

A key is rounded to the cache's dtype at every eviction it survives. In float32 that is nothing. In float16 it is 2e-4
each time, and a turn by a small angle rounds to no turn at all, so what matters is how often: a capacity just above the
window evicts at every token, and a key of a window of 1,024 has lost its place (error 5e-2) before it leaves. With a
capacity of 9/8 of the window a key survives 8 evictions: an error of 6e-4 on average, 1.2e-3 of the worst of a
thousand. Chunks of several tokens evict from a row before it is full; at worst that halves the shifts, and makes it
9e-4 and 1.8e-3. With 3/2 of the window every key stays within 1e-3, whatever the chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crt_export.models.declaration import HALF, CacheSpec, Carried


@dataclass(frozen=True, kw_only=True)
class Window:
    """The attention window of a model, and how its keys are rotated.

    Attributes:
        size: Keys that a token sees, itself included.
        head_dim: Rotated channels of a head; a cache may hold more, which are padding.
        rope_layout: ``interleaved`` (pairs 2j, 2j+1) or ``half`` (pairs j, j + head_dim/2).
        rope_theta: Rotary base, where there are no ``frequencies``.
        frequencies: Radians per position of each pair.
    """

    size: int
    head_dim: int
    rope_layout: str
    rope_theta: float = 10000.0
    frequencies: tuple[float, ...] = ()

    def least_capacity(self, cache_dtype: str) -> int:
        """Smallest capacity to evict in: the window, and an eighth more where keys are rounded to float16."""
        return self.size + (-(-self.size // 8) if cache_dtype == "float16" else 0)

    def kept(self, position: int) -> int:
        """How many of a row's tokens an eviction keeps."""
        return min(self.size - 1, position)

    def evict(self, row: np.ndarray, position: int, *, keys: bool) -> np.ndarray:
        """The cache of one row after an eviction.

        Args:
            row: Keys or values, [heads, capacity, head_dim], ``position`` tokens in it.
            position: Tokens in the row.
            keys: Whether these are keys, which are turned as well as moved.

        Returns:
            A new array of the same shape and dtype: the latest tokens in front, zeros behind them.
        """
        kept = self.kept(position)
        latest = row[:, position - kept : position]
        moved = np.zeros_like(row)
        moved[:, :kept] = self.turn_back(latest, position - kept) if keys else latest
        return moved

    def turn_back(self, keys: np.ndarray, shift: int) -> np.ndarray:
        """Keys as they would be ``shift`` positions earlier.

        Angles are those of the rotary tables in float64.

        Args:
            keys: Rotated keys, [..., at least head_dim].
            shift: Positions to go back.

        Returns:
            float64 of the same shape, not rounded: evict() rounds once, when it stores them.
        """
        half = self.head_dim // 2
        from_base = self.rope_theta ** (-2.0 * np.arange(half, dtype=np.float64) / self.head_dim)
        angles = shift * (np.array(self.frequencies) if self.frequencies else from_base)
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = self._pairs()
        turned = keys.astype(np.float64)
        a, b = turned[..., first].copy(), turned[..., second].copy()
        turned[..., first] = a * cos + b * sin
        turned[..., second] = b * cos - a * sin
        return turned

    def _pairs(self) -> tuple[slice, slice]:
        """Channels of the first and of the second halves of the rotated pairs."""
        if self.rope_layout == "interleaved":
            return slice(0, self.head_dim, 2), slice(1, self.head_dim, 2)
        half = self.head_dim // 2
        return slice(0, half), slice(half, self.head_dim)


def windows_of_caches(carried: Carried) -> tuple[Window, ...] | None:
    """What each cache keeps of a full row and how its keys are turned: as much as the widest window needs.

    None where rows cannot be moved: a cache whose tokens see every key, or positions that enter otherwise than by
    rotation.
    """
    sizes = [cache.window for cache in carried.caches]
    if not carried.relative or None in sizes:
        return None
    widest = max(size for size in sizes if size is not None)
    return tuple(_window(cache, widest) for cache in carried.caches)


def _window(cache: CacheSpec, size: int) -> Window:
    if cache.rotary is None:
        return Window(size=size, head_dim=cache.head_dim, rope_layout=HALF, frequencies=(0.0,) * (cache.head_dim // 2))
    rotary = cache.rotary
    return Window(size=size, head_dim=cache.head_dim, rope_layout=rotary.layout, frequencies=rotary.frequencies)
