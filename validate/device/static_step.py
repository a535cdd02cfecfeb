"""One token of decoding in PyTorch as good code does it on a GPU: every buffer keeps its address.

Weights and layers are those of :class:`crt_export.bench.static_model.StaticModel`. What differs from its step is what a
CUDA graph asks for: the position lies on the device, tokens, state and logits are written into fixed buffers. Heads are
padded to a multiple of 8 in the caches, as the fused attention kernels for 16-bit numbers ask for; zeros change no
product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crt_export.bench.static_model import StaticModel, model_from_tensors
from crt_export.bench.step_cost import step_flops
from crt_export.config import ModelConfig
from crt_export.models.presets import random_tensors
from crt_export.models.registry import linear_weights, meta_model

_ALIGNMENT = 8


def random_model(config: ModelConfig, *, dtype: torch.dtype, device: str, seed: int = 0) -> StaticModel:
    """The model with the random weights of ``crt-export init``, in ``dtype`` on ``device``."""
    return model_from_tensors(config, random_tensors(config, seed)).to(device, dtype)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one step moves in bytes, and computes in operations (two for each multiply-add).

    Attributes:
        weights: Bytes of the weights that a step reads; of the embedding one row per sequence.
        cache: Bytes of keys and values over the used length.
        logits: Bytes of the logits.
        flops: Operations of the linears and of attention.
    """

    weights: int
    cache: int
    logits: int
    flops: int

    @property
    def total(self) -> int:
        """Bytes that have to be moved."""
        return self.weights + self.cache + self.logits


def step_cost(config: ModelConfig, *, batch: int, position: int, bytes_per_number: int) -> StepCost:
    """Of one token for each of ``batch`` sequences that hold ``position`` tokens, every number of the same size."""
    table = (
        0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    )  # a tied one is read as the head
    read = config.parameter_count - table + batch * config.hidden_size
    multiplied = sum(meta_model(config).get_parameter(name).numel() for name in linear_weights(config))
    caches = sum(spec.width * spec.attended(position) for spec in config.carried.caches)
    return StepCost(
        weights=read * bytes_per_number,
        cache=batch * caches * bytes_per_number,
        logits=batch * config.vocab_size * bytes_per_number,
        flops=step_flops(config.carried, multiplied=multiplied, position=position, batch=batch),
    )


class StaticStep:
    """A batch of equally long sequences, decoded greedily: each call reads its own last token and state.

    Args:
        model: Weights, on their device in their dtype; without an attention window.
        batch: Sequences.
        context: Tokens that the caches have room for.
        masked: Attend over the whole buffer under a mask made from the position on the device, as a captured graph
            has to; otherwise over the used slice, which a host that knows the position can take.

    Attributes:
        ids: Next tokens, int64 [batch, 1], written by every call.
        state: h of the last token, [batch, 1, hidden].
        logits: [batch, vocab] of the last call.
        position: Tokens in the caches, int64 [1] on the device.
    """

    def __init__(self, model: StaticModel, *, batch: int, context: int, masked: bool) -> None:
        config, like = model.config, model.final_norm.weight
        self.model, self.batch, self.context, self.masked = model, batch, context, masked
        self._layers: list[Any] = list(model.layers)
        self._width = -(-model.spec.head_dim // _ALIGNMENT) * _ALIGNMENT
        shape = (len(self._layers), 2, batch, model.spec.heads, context, self._width)
        self._caches = like.new_zeros(shape)
        self._slots = torch.arange(context, device=like.device)
        self._used = 0
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=like.device)
        self.state = like.new_zeros(batch, 1, config.hidden_size)
        self.logits = like.new_zeros(batch, config.vocab_size)

    def seek(self, position: int) -> None:
        """Go to a position; what the caches hold below it is attended as it is."""
        if not 0 <= position < self.context:
            raise ValueError(f"position must be from 0 to {self.context - 1}, found {position}")
        self._used = position
        self.position.fill_(position)

    @torch.inference_mode()
    def __call__(self) -> None:
        """Decode one token at the position, without moving on."""
        model = self.model
        z = model.embed(self.ids)
        if model.config.carried.iterated:
            z = z + model.correction(model.correction_norm(self.state + z))
        rope = (model.cos[self.position], model.sin[self.position])
        mask = (self._slots <= self.position)[None, None, None] if self.masked else None
        for layer, cache in zip(self._layers, self._caches, strict=True):
            z = z + self._attention(layer, cache, layer.attn_norm(z), rope, mask)
            z = z + layer.mlp(layer.mlp_norm(z))
        self.state.copy_(z)
        self.logits.copy_(model.lm_head(model.final_norm(z))[:, 0])
        self.ids.copy_(self.logits.argmax(-1, keepdim=True))

    def _attention(
        self, layer: Any, cache: Tensor, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Attention of one layer; ``cache`` is [2, batch, heads, context, width], ``x`` [batch, 1, hidden]."""
        heads, size = self.model.spec.heads, self.model.spec.head_dim
        qkv = layer.qkv(x).view(self.batch, 3, heads, 1, size)
        turned = torch.addcmul(qkv[:, :2] * rope[0], qkv[:, :2].roll(size // 2, -1), rope[1])
        cache[0, ..., :size].index_copy_(2, self.position, turned[:, 1])
        cache[1, ..., :size].index_copy_(2, self.position, qkv[:, 2])
        q = F.pad(turned[:, 0], (0, self._width - size)) if self._width > size else turned[:, 0]
        keys, values = cache if mask is not None else cache[:, :, :, : self._used + 1]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=size**-0.5)
        return layer.o(y[..., :size].transpose(1, 2).flatten(2))
