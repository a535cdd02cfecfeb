"""Sizes of the tensors of one session."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TensorSizes:
    """What a session's tensors are made of.

    Attributes:
        batch: Rows.
        capacity: Most tokens of a row.
        vocab: Logits of a row.
        hidden: Hidden size.
        layers: Layers with a key and a value cache each.
        heads: Heads of a cache.
        head_dim: Size of a head.
        cache_dtype: ``float32`` or ``float16``.
        recurrent: Whether there is a recurrent state.
        unroll: Passes that prefill makes where nobody asks for a number; None for a plain transformer.
    """

    batch: int
    capacity: int
    vocab: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    cache_dtype: str
    recurrent: bool
    unroll: int | None = None
