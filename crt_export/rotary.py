"""Rotary position embedding: the tables, the rotation, and the operator that a graph has for it.

In PyTorch the rotation is its equations. While a graph is exported it is one call of the operator
``crt_export::rotary_embedding``, whose eager implementation are the same equations and whose ONNX form is one
``RotaryEmbedding`` node (opset 23 and later) instead of a dozen elementwise ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_INTERLEAVED = "interleaved"


#: cos and sin of the angles at some positions, see :func:`rope_at`.
Rope = tuple[Tensor, ...]


def frequencies_from_base(theta: float, head_dim: int) -> tuple[float, ...]:
    """``theta^(-2j/head_dim)``, radians per position of each pair, [head_dim/2], computed in float64."""
    return tuple((theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)).tolist())


def rope_tables(positions: int, frequencies: Sequence[float]) -> tuple[Tensor, Tensor]:
    """cos and sin of ``position * frequency``, float32 [positions, head_dim/2], computed in float64."""
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return angle.cos().float(), angle.sin().float()


def rope_at(tables: Sequence[Tensor], positions: Tensor) -> Rope:
    """What :func:`rotate` rotates by at some positions.

    Args:
        tables: cos and sin, each [positions, head_dim/2].
        positions: int64 [batch, seq].

    Returns:
        cos and sin, each [batch, 1, seq, head_dim/2], the same for every head; while a graph is exported each
        [batch, seq, head_dim/2], as its operator takes them.
    """
    rows = tuple(F.embedding(positions, table) for table in tables)
    return rows if torch.compiler.is_exporting() else tuple(row.unsqueeze(1) for row in rows)


def rotate(x: Tensor, rope: Rope, layout: str) -> Tensor:
    """Rotary embedding, ``(a cos - b sin, a sin + b cos)`` on the pairs of the layout.

    Args:
        x: Queries or keys, [batch, heads, seq, head_dim].
        rope: cos and sin, see :func:`rope_at`.
        layout: ``interleaved`` pairs (2j, 2j+1), ``half`` pairs (j, j + head_dim/2).
    """
    cos, sin = rope
    if torch.compiler.is_exporting():
        return rotary_embedding(x, cos, sin, layout == _INTERLEAVED)
    return _rotated(x, cos, sin, interleaved=layout == _INTERLEAVED)


@torch.library.custom_op("crt_export::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """:func:`rotate` as an operator that stays whole in an exported program; cos and sin [batch, seq, head_dim/2]."""
    return _rotated(x, cos.unsqueeze(1), sin.unsqueeze(1), interleaved=interleaved)


@rotary_embedding.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    del cos, sin, interleaved
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
