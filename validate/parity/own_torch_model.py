"""A user's own model: a CRT or a plain transformer in PyTorch, written without a line of crt_export.

Keys and values of all tokens are computed anew at every step, rotation is a product of complex numbers, attention is a
softmax over an explicit mask: what the two have in common are the equations and the names of the weights. Every field
of :class:`Habits` is something that people do otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How the user's model computes; ``passes`` None is the recurrence."""

    heads: int = 4
    layout: str = "interleaved"
    theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = False
    window: int | None = None
    passes: int | None = None
    first_position: int = 0
    gelu: Callable[[Tensor], Tensor] = nn.functional.gelu
    correction: str = "ffn(norm(h + x))"
    rotary: bool = True
    rms: bool = False
    transposed: bool = False
    bos: int | None = None


class OwnModel(nn.Module):
    """``model(ids [1, n]) -> logits [1, n, vocab]``."""

    def __init__(self, weights: Weights, habits: Habits) -> None:
        super().__init__()
        self.w, self.habits = dict(weights), habits
        self.layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})

    def forward(self, ids: Tensor) -> Tensor:
        if self.habits.bos is not None:
            ids = torch.cat([ids.new_full((1, 1), self.habits.bos), ids], dim=1)
        h = self.hidden(ids)
        logits = self.norm(h, "final_norm") @ self.head_weight().T
        if not self.habits.tied:
            logits = logits + self.w["lm_head.bias"]
        return logits[:, 0 if self.habits.bos is None else 1 :]

    def head_weight(self) -> Tensor:
        return self.w["embed.weight"] if self.habits.tied else self.w["lm_head.weight"]

    def hidden(self, ids: Tensor) -> Tensor:
        """The output of the last layer at each position."""
        x = self.w["embed.weight"][ids]
        if "correction.up.weight" not in self.w:
            return self.blocks(x)
        h = torch.zeros_like(x)
        # The recurrence without a cache: position t is right after t + 1 passes over the whole.
        for _ in range(self.habits.passes or ids.shape[1]):
            before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
            h = self.blocks(self.corrected(x, before))
        return h

    def corrected(self, x: Tensor, h: Tensor) -> Tensor:
        def norm(u: Tensor) -> Tensor:
            return self.norm(u, "correction.norm")

        def ffn(u: Tensor) -> Tensor:
            return self.linear(self.habits.gelu(self.linear(u, "correction.up")), "correction.down")

        return {
            "ffn(norm(h + x))": lambda: x + ffn(norm(h + x)),
            "ffn(norm(h))": lambda: x + ffn(norm(h)),
            "ffn(norm(h) + norm(x))": lambda: x + ffn(norm(h) + norm(x)),
            "added to h + x": lambda: h + x + ffn(norm(h + x)),
            "none": lambda: x,
        }[self.habits.correction]()

    def blocks(self, z: Tensor) -> Tensor:
        for i in range(self.layers):
            z = z + self.attention(self.norm(z, f"layers.{i}.attn_norm"), f"layers.{i}.attn")
            inner = self.habits.gelu(self.linear(self.norm(z, f"layers.{i}.mlp_norm"), f"layers.{i}.mlp.up"))
            z = z + self.linear(inner, f"layers.{i}.mlp.down")
        return z

    def attention(self, x: Tensor, name: str) -> Tensor:
        n = x.shape[1]
        q, k, v = (self.split(self.linear(x, f"{name}.{part}")) for part in "qkv")
        if self.habits.rotary:
            q, k = self.rotated(q), self.rotated(k)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        distance = torch.arange(n)[:, None] - torch.arange(n)
        seen = (distance >= 0) & (distance < (self.habits.window or n))
        mixed = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ v
        return self.linear(mixed.transpose(1, 2).reshape(x.shape), f"{name}.o")

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.habits.heads, -1).transpose(1, 2)

    def rotated(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        positions = self.habits.first_position + torch.arange(x.shape[-2], dtype=torch.float64)
        angles = positions[:, None] * self.habits.theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        if self.habits.layout == "interleaved":
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turn).flatten(-2)
        turned = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[f"{name}.weight"]
        square = weight.shape[0] == weight.shape[1]
        return x @ (weight if square and self.habits.transposed else weight.T) + self.w[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean = 0.0 if self.habits.rms else x.mean(dim=-1, keepdim=True)
        centred = x - mean
        scaled = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + self.habits.eps)
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]
