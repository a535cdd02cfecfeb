"""The model as one writes it for fast decoding in plain PyTorch: what a deployment without this package would run.

The same function as :class:`crt_export.models.base.LanguageModel` for one shape of model, :func:`is_classic` (a test
holds the two equal), arranged for speed: caches allocated once and written in place, one product for q, k and v,
weights stored as [in, out] behind ``nn.Linear`` (which took a fifth off the step of a D=5 C=1120 model on two cores of
an EPYC against [out, in], PyTorch 2.13), one rotation of q and k together, fused attention over the used length only,
and nothing that runs once per token in Python beyond calling these. Interleaved rotary pairs become halves by permuting
the rows of W_q and W_k when weights are loaded: q and k turn alike, so their products, and everything after them, stay
the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crt_export.config import ModelConfig
from crt_export.models.crt import CrtConfig
from crt_export.models.declaration import HALF, CacheSpec
from crt_export.rotary import rope_tables

#: Where the tokens of a call go in the caches: a slice, or their positions as int64 [seq] where a compiler needs it.
Place = slice | Tensor
#: logits [batch, vocab], the likeliest token int64 [batch, 1], h [batch, 1, hidden].
Result = tuple[Tensor, Tensor, Tensor]


#: Keys whose values stand in what a model declares of its caches.
_OF_CACHES = {
    "num_key_value_heads", "head_dim", "rope_theta", "rope_frequencies", "rope_layout", "layer_attention",
    "sliding_window",
}  # fmt: skip


def is_classic(config: ModelConfig) -> bool:
    """Whether :class:`StaticModel` computes a model.

    It has no option but defaults, and all its layers have full heads, one rotation and one window. A key that no CRT
    has may mean anything, so a configuration with one is not of this shape.
    """
    options = [key for key in fields(config) if key.default is not MISSING]
    used = {key.name for key in options if getattr(config, key.name) != key.default}
    if set(config.KEYS) - set(CrtConfig.KEYS) or used - _OF_CACHES - set(ModelConfig.KEYS):
        return False
    alike = {replace(spec, name="") for spec in config.carried.caches}
    return len(alike) == 1 and all(
        spec.rotary is not None and spec.heads == spec.query_heads and spec.width == 2 * config.hidden_size
        for spec in alike
    )


class _FeedForward(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class _Layer(nn.Module):
    def __init__(self, config: Any, spec: CacheSpec) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        self.heads, self.head_dim = spec.heads, spec.head_dim
        self.attn_norm, self.mlp_norm = nn.LayerNorm(hidden, eps), nn.LayerNorm(hidden, eps)
        self.qkv, self.o = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = _FeedForward(hidden, config.intermediate_size)

    def forward(self, z: Tensor, rope: tuple[Tensor, Tensor], cache: Tensor, step: _Call) -> Tensor:
        batch, seq, _ = z.shape
        qkv = self.qkv(self.attn_norm(z)).view(batch, seq, 3 * self.heads, self.head_dim)
        q, k = _rotate(qkv[:, :, : 2 * self.heads], rope).transpose(1, 2).split(self.heads, dim=1)
        v = qkv[:, :, 2 * self.heads :].transpose(1, 2)
        cache[0, :, :, step.place] = k
        cache[1, :, :, step.place] = v
        keys, values = cache[:, :, :, step.begin : step.end].unbind(0)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=step.mask, is_causal=step.causal)
        a = z + self.o(y.transpose(1, 2).reshape(batch, seq, -1))
        return a + self.mlp(self.mlp_norm(a))


class _Call:
    """Where the tokens of a call go in the caches and what they see there."""

    def __init__(self, place: Place, begin: int, end: int, mask: Tensor | None, *, causal: bool) -> None:
        self.place, self.begin, self.end, self.mask, self.causal = place, begin, end, mask, causal


class StaticModel(nn.Module):
    """CRT or plain transformer for inference, float32.

    Attributes:
        config: Its configuration, for which :func:`is_classic` holds.
        spec: What each of its caches is.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        self.config: ModelConfig = config
        self.spec = config.carried.caches[0]
        self.embed = nn.Embedding(config.vocab_size, hidden)
        if config.carried.iterated:
            self.correction_norm = nn.LayerNorm(hidden, eps)
            self.correction = _FeedForward(hidden, config.correction_intermediate_size)
        self.layers = nn.ModuleList(_Layer(config, spec) for spec in config.carried.caches)
        self.final_norm = nn.LayerNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=not config.tie_word_embeddings)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    def reset_tables(self) -> None:
        """Compute the rotary tables, which no checkpoint stores."""
        rotary = self.spec.rotary
        assert rotary is not None
        cos, sin = rope_tables(self.config.max_position_embeddings, rotary.frequencies)
        self.cos, self.sin = torch.cat([cos, cos], 1)[:, None], torch.cat([-sin, sin], 1)[:, None]

    def caches(self, batch: int, capacity: int) -> tuple[Tensor, ...]:
        """Zeroed caches, per layer [2 (key, value), batch, heads, capacity, head_dim]."""
        return zeroed_caches(self.config, batch, capacity)

    def start(self, batch: int) -> Tensor:
        """The recurrent state before the first token, [batch, 1, hidden]; a plain transformer carries it unused."""
        return torch.zeros(batch, 1, self.config.hidden_size)

    def step(self, ids: Tensor, state: Tensor, caches: Sequence[Tensor], position: int) -> Result:
        """One token per row.

        Args:
            ids: int64 [batch, 1].
            state: h of the token before, [batch, 1, hidden].
            caches: Of caches(); written in place.
            position: Tokens in the caches, the same for all rows.

        Returns:
            logits [batch, vocab], the likeliest token int64 [batch, 1], h [batch, 1, hidden].
        """
        end, window = position + 1, self.spec.window
        begin = 0 if window is None else max(0, end - window)
        rope = (self.cos[position:end], self.sin[position:end])
        h = self._blocks(ids, state, rope, caches, _Call(slice(position, end), begin, end, None, causal=False))
        return self._result(h)

    def step_padded(self, ids: Tensor, state: Tensor, caches: Sequence[Tensor], position: Tensor, end: int) -> Result:
        """As step(), in the form that torch.compile can keep: no size depends on the position.

        Args:
            ids: int64 [batch, 1].
            state: h of the token before, [batch, 1, hidden].
            caches: Of caches(); written in place.
            position: Tokens in the caches, int64 [1].
            end: Cache entries that attention reads, beyond the position masked; one graph is compiled per value.
        """
        slot, window = torch.arange(end), self.spec.window
        seen = slot <= position
        if window is not None:
            seen = seen & (slot > position - window)
        rope = (self.cos[position], self.sin[position])
        h = self._blocks(ids, state, rope, caches, _Call(position, 0, end, seen[None, None, None], causal=False))
        return self._result(h)

    def prefill(self, ids: Tensor, caches: Sequence[Tensor], passes: int) -> Result:
        """A prompt from an empty cache, int64 [batch, seq], in this many parallel passes; returns as step()."""
        batch, seq = ids.shape
        window = self.spec.window
        mask = None
        if window is not None and window < seq:
            index = torch.arange(seq)
            mask = (index <= index[:, None]) & (index[:, None] - window < index)
        call = _Call(slice(0, seq), 0, seq, mask, causal=mask is None)
        h = torch.zeros(batch, seq, self.config.hidden_size)
        rope, first = (self.cos[:seq], self.sin[:seq]), self.start(batch)
        for _ in range(passes):
            h = self._blocks(ids, torch.cat([first, h[:, :-1]], 1), rope, caches, call)
        return self._result(h[:, -1:])

    def _blocks(
        self, ids: Tensor, previous: Tensor, rope: tuple[Tensor, Tensor], caches: Sequence[Tensor], call: _Call
    ) -> Tensor:
        z = self.embed(ids)
        if self.config.carried.iterated:
            z = z + self.correction(self.correction_norm(previous + z))
        for layer, cache in zip(self.layers, caches, strict=True):
            z = layer(z, rope, cache, call)
        return z

    def _result(self, h: Tensor) -> Result:
        logits = self.lm_head(self.final_norm(h))[:, -1]
        return logits, logits.argmax(-1, keepdim=True), h


def zeroed_caches(config: ModelConfig, batch: int, capacity: int) -> tuple[Tensor, ...]:
    """Per cache keys and values in one tensor, [2, batch, heads, capacity, head_dim]."""
    specs = config.carried.caches
    return tuple(torch.zeros(2, batch, spec.heads, capacity, spec.head_dim) for spec in specs)


def model_from_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> StaticModel:
    """The model in evaluation mode with the weights of a checkpoint, linears as [out, in]."""
    with torch.device("meta"):
        model = StaticModel(config)
    model.reset_tables()
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attn." in name and name.split(".")[-2] in ("q", "k", "v"):
            continue
        state[_renamed(name)] = tensor
    for layer in range(len(model.layers)):
        for kind in ("weight", "bias"):
            parts = [tensors[f"layers.{layer}.attn.{part}.{kind}"] for part in "qkv"]
            parts[:2] = [_in_halves(part, model.spec) for part in parts[:2]]
            state[f"layers.{layer}.qkv.{kind}"] = torch.cat(parts)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = tensors["embed.weight"]
    model.load_state_dict(state, assign=True)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)
    return model.eval().requires_grad_(False)


def _renamed(name: str) -> str:
    for old, new in ((".attn.o.", ".o."), ("correction.norm.", "correction_norm.")):
        name = name.replace(old, new)
    return name


def _in_halves(rows: Tensor, spec: CacheSpec) -> Tensor:
    """Rows of W_q or W_k (or their bias) so that rotary pairs are (j, j + head_dim/2)."""
    if spec.rotary is None or spec.rotary.layout == HALF:
        return rows
    pairs = rows.unflatten(0, (spec.heads, spec.head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """``(a cos - b sin, a sin + b cos)`` on halves, x [batch, seq, heads, head_dim], rope [seq, 1, head_dim] each."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
