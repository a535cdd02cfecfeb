"""Transformer: one block that covers the decoders of the field, without recurrence.

::

    x_t = E[token_t] (+ P[t])                           learned_positions
    a   = z + post(Attn(pre(z)))                        norm_placement: a norm that it lacks is the identity
    z'  = a + post(Mlp(pre(a)))                         pre(z) with parallel_residual
    Attn: q, k, v = W u; q, k = N(q), N(k) (qk_norm); rotated; softmax(q k^T / sqrt(head_dim)) v within the window
    Mlp:  down(act(up u))                               down(act(gate u) * up u) with gated_mlp
    logits_t = W_head LN_f(z^D_t)                       c tanh(logits / c) with logit_softcap c

Tensors of a checkpoint, linears as [out, in]; biases where ``biases``, of norms where ``norm`` is ``layer``::

    embed.weight, positions.weight
    layers.{i}.attn_norm, .attn.{q,k,v,o}, .attn.{q,k}_norm, .attn_post_norm
    layers.{i}.mlp_norm, .mlp.{gate,up,down}, .mlp_post_norm
    final_norm, lm_head (no lm_head when tied)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crt_export.cache import Cache
from crt_export.config import FLAG, MOST_LAYERS, Key, ModelConfig, count, is_finite_number, is_integer, number, one_of
from crt_export.models.base import LanguageModel, Pass
from crt_export.models.declaration import HALF, INTERLEAVED, CacheSpec, Carried, Rotary
from crt_export.models.layers import ACTIVATIONS, NORMS, DeclaresLinears, Fold, Linear, Mlp
from crt_export.rotary import Rope, frequencies_from_base, rope_at, rope_tables, rotate

PLACEMENTS = ("pre", "post", "sandwich")
QK_NORMS = ("none", "head", "full")


def _is_frequencies(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(
            isinstance(chosen, list | tuple) and len(chosen) > 0 and all(is_finite_number(one) for one in chosen)
            for chosen in value
        )
    )


def _is_pattern(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(one is None or is_integer(one) for one in pair)
            for pair in value
        )
    )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """Keys of a transformer besides those of every model.

    Attributes:
        norm: ``layer`` or ``rms``; ``norm_eps`` is added to the variance.
        norm_placement: ``pre``, ``post`` (of a branch's output only) or ``sandwich`` (both).
        parallel_residual: Attention and MLP read the same input.
        activation: Of the MLP, see :data:`crt_export.models.layers.ACTIVATIONS`.
        biases: Whether linears have one.
        qk_norm: ``none``, ``head`` (a gain per head) or ``full`` (over all heads).
        rope_theta: Base of the one rotation, or
        rope_frequencies: Sets of radians per position, [head_dim/2] each, 0 where a pair is not turned. A model with
            ``learned_positions`` may have neither.
        layer_attention: Pairs of (window or None, index of a set or None), repeated over the layers; or
        sliding_window: The window of all layers, the token itself included.
        logit_softcap: Bound of the logits, None for none.
    """

    KEYS: ClassVar[Mapping[str, Key]] = {
        **ModelConfig.KEYS,
        "num_hidden_layers": count(most=MOST_LAYERS),
        "num_attention_heads": count(),
        "num_key_value_heads": count(),
        "head_dim": count(),
        "intermediate_size": count(),
        "norm": one_of(*NORMS),
        "norm_eps": number(),
        "norm_placement": one_of(*PLACEMENTS),
        "parallel_residual": FLAG,
        "activation": one_of(*ACTIVATIONS),
        "gated_mlp": FLAG,
        "biases": FLAG,
        "qk_norm": one_of(*QK_NORMS),
        "rope_theta": number(optional=True),
        "rope_frequencies": Key(
            is_kind=_is_frequencies, kind="a list of lists of head_dim/2 finite numbers", optional=True
        ),
        "rope_layout": one_of(INTERLEAVED, HALF),
        "layer_attention": Key(
            is_kind=_is_pattern, kind="a list of pairs [window or null, rotary set or null]", optional=True
        ),
        "sliding_window": count(optional=True),
        "learned_positions": FLAG,
        "logit_softcap": number(optional=True),
    }
    DERIVED: ClassVar[tuple[str, ...]] = ("head_dim", "num_key_value_heads")
    OLDER_NAMES: ClassVar[Mapping[str, str]] = {"layer_norm_eps": "norm_eps"}
    IGNORED: ClassVar[tuple[str, ...]] = ("correction_intermediate_size", "unroll_steps")

    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    norm_eps: float
    norm: str = "layer"
    norm_placement: str = "pre"
    parallel_residual: bool = False
    activation: str = "gelu"
    gated_mlp: bool = False
    biases: bool = True
    qk_norm: str = "none"
    num_key_value_heads: int = 0
    head_dim: int = 0
    rope_theta: float | None = None
    rope_frequencies: tuple[tuple[float, ...], ...] | None = None
    rope_layout: str = HALF
    layer_attention: tuple[tuple[int | None, int | None], ...] | None = None
    sliding_window: int | None = None
    learned_positions: bool = False
    logit_softcap: float | None = None

    def derived(self) -> dict[str, Any]:
        """Sizes of the heads."""
        return {
            "head_dim": self.head_dim or self.hidden_size // self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads or self.num_attention_heads,
        }

    @classmethod
    def missing_keys(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """Besides the others: positions must come from somewhere, and a rotation has a layout."""
        yield from super().missing_keys(values)
        rotary = values.get("rope_theta") is not None or values.get("rope_frequencies") is not None
        if not rotary and values.get("learned_positions") is not True and values.get("layer_attention") is None:
            yield "rope_theta"
        if "rope_layout" not in values and (rotary or values.get("learned_positions") is not True):
            yield "rope_layout"

    @classmethod
    def relation_problems(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """Values that contradict each other."""
        yield from super().relation_problems(values)
        hidden, heads = values.get("hidden_size", 0), values.get("num_attention_heads", 0)
        kv_heads, given = values.get("num_key_value_heads", 0), values.get("head_dim", 0)
        if heads > 0 and given == 0 and hidden % heads:
            yield f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        head_dim = given or (hidden // heads if heads > 0 else 0)
        if not (heads > 0 and given == 0 and hidden % heads) and head_dim % 2:
            yield f"head_dim must be even for rotary embedding, found {head_dim}"
        if heads > 0 and kv_heads > 0 and heads % kv_heads:
            yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        yield from _position_problems(values, head_dim)

    @cached_property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The rotary sets, as ``layer_attention`` numbers them."""
        sets = self.rope_frequencies or ()
        if self.rope_theta is not None:
            sets = (frequencies_from_base(self.rope_theta, self.head_dim),)
        return tuple(Rotary(layout=self.rope_layout, frequencies=tuple(map(float, chosen))) for chosen in sets)

    def attention(self, layer: int) -> tuple[int | None, int | None]:
        """Window and rotary set of one layer; None: all tokens, no rotation."""
        if self.layer_attention is None:
            return self.sliding_window, 0 if self.rotaries else None
        return self.layer_attention[layer % len(self.layer_attention)]

    def declare(self) -> Carried:
        """One cache a layer."""
        return Carried(
            caches=tuple(map(self._cache, range(self.num_hidden_layers))), relative=not self.learned_positions
        )

    def _cache(self, layer: int) -> CacheSpec:
        window, chosen = self.attention(layer)
        return CacheSpec(
            name=f"layers.{layer}",
            heads=self.num_key_value_heads,
            query_heads=self.num_attention_heads,
            head_dim=self.head_dim,
            window=window,
            rotary=None if chosen is None else self.rotaries[chosen],
        )


def _position_problems(values: Mapping[str, Any], head_dim: int) -> Iterator[str]:
    """What is wrong between the keys about positions."""
    theta, sets, pattern = (values.get(name) for name in ("rope_theta", "rope_frequencies", "layer_attention"))
    if theta is not None and sets is not None:
        yield "rope_theta and rope_frequencies exclude each other"
    for index, chosen in enumerate(sets or ()):
        if head_dim and len(chosen) != head_dim // 2:
            yield f"rope_frequencies: set {index} must hold head_dim/2 = {head_dim // 2} numbers, found {len(chosen)}"
    if pattern is None:
        return
    if values.get("sliding_window") is not None:
        yield "sliding_window and layer_attention exclude each other"
    there = len(sets) if sets is not None else int(theta is not None)
    for window, chosen in pattern:
        if window is not None and window <= 0:
            yield f"layer_attention: a window must be greater than 0, found {window}"
        if chosen is not None and not 0 <= chosen < there:
            yield f"layer_attention: rotary set {chosen} of {there}"


class Attention(nn.Module, DeclaresLinears):
    """Causal attention of grouped queries over the keys that a cache provides."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        #: Attributes, so that crt_export.parity.own_model_causes can try others.
        self.layer, self.rotary_set, self.rope_layout = layer, config.attention(layer)[1], config.rope_layout
        self.qk_norm = config.qk_norm
        hidden, bias = config.hidden_size, config.biases
        self.q = Linear(hidden, self.heads * self.head_dim, bias=bias)
        self.k, self.v = (Linear(hidden, self.kv_heads * self.head_dim, bias=bias) for _ in range(2))
        self.o = Linear(self.heads * self.head_dim, hidden, bias=bias)
        self.cached = {layer: ("k", "v")}
        self.folds = {"o": Fold(producer="v", heads=(self.kv_heads, self.heads), cached=True)}
        if self.qk_norm != "none":
            per_head, norm = self.qk_norm == "head", NORMS[config.norm]
            self.q_norm, self.k_norm = (
                norm((heads, self.head_dim) if per_head else heads * self.head_dim, config.norm_eps)
                for heads in (self.heads, self.kv_heads)
            )

    def forward(self, x: Tensor, ropes: Mapping[int, Rope], cache: Cache) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (values.unflatten(-1, (-1, self.head_dim)) for values in (q, k, v))  # [batch, seq, heads, head_dim]
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (values.transpose(1, 2) for values in (q, k, v))
        if self.rotary_set is not None:
            k = rotate(k, ropes[self.rotary_set], self.rope_layout)
        keys, values, mask = cache.extend(self.layer, k, v)
        if self.rotary_set is not None:
            q = rotate(q, ropes[self.rotary_set], self.rope_layout)
        grouped = {"enable_gqa": True} if self.heads != self.kv_heads else {}
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.head_dim**-0.5, **grouped)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer; the residual stream ``z`` keeps its own dtype."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        pre, post = config.norm_placement != "post", config.norm_placement != "pre"

        def norm(there: bool) -> nn.Module:
            return NORMS[config.norm](config.hidden_size, config.norm_eps) if there else nn.Identity()

        self.attn_norm = norm(pre)
        self.attn = Attention(config, layer)
        self.attn_post_norm = norm(post)
        self.mlp_norm = norm(pre)
        self.mlp = Mlp(
            config.hidden_size,
            config.intermediate_size,
            ACTIVATIONS[config.activation],
            gated=config.gated_mlp,
            bias=config.biases,
        )
        self.mlp_post_norm = norm(post)
        self.parallel = config.parallel_residual

    def forward(self, z: Tensor, ropes: Mapping[int, Rope], cache: Cache) -> Tensor:
        a = z + self.attn_post_norm(self.attn(self.attn_norm(z), ropes, cache)).to(z.dtype)
        return a + self.mlp_post_norm(self.mlp(self.mlp_norm(z if self.parallel else a))).to(z.dtype)


class Transformer(LanguageModel):
    """A decoder without recurrence; one pass over a chunk is exact."""

    config_class = TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.add_correction()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.final_norm = NORMS[config.norm](config.hidden_size, config.norm_eps)
        self.lm_head = Linear(
            config.hidden_size, config.vocab_size, bias=config.biases and not config.tie_word_embeddings
        )

    def add_correction(self) -> None:
        """Add what reads the recurrent state, between embedding and layers; here nothing."""

    def reset_tables(self) -> None:
        """Compute the rotary tables, which no checkpoint stores."""
        found = (self.config.attention(layer)[1] for layer in range(len(self.layers)))
        used = sorted({index for index in found if index is not None})
        for index in used:
            cos, sin = rope_tables(self.config.max_position_embeddings, self.config.rotaries[index].frequencies)
            suffix = f"_{index}" if index else ""
            self.register_buffer(f"rope_cos{suffix}", cos, persistent=False)
            self.register_buffer(f"rope_sin{suffix}", sin, persistent=False)
        self.rotary_sets = tuple(used)

    def ropes(self, positions: Tensor) -> dict[int, Rope]:
        """What keys and queries at some positions, int64 [batch, seq], are turned by, for each rotary set."""
        tables = {index: f"_{index}" if index else "" for index in self.rotary_sets}
        return {
            index: rope_at((getattr(self, f"rope_cos{suffix}"), getattr(self, f"rope_sin{suffix}")), positions)
            for index, suffix in tables.items()
        }

    def run_pass(self, ids: Tensor, before: Mapping[str, Tensor], position: Tensor, cache: Cache) -> Pass:
        """One pass over a chunk, see :meth:`crt_export.models.base.LanguageModel.run_pass`."""
        positions = position[:, None] + torch.arange(ids.shape[1], device=ids.device)
        z = self.corrected(self.embedded(ids, positions), before)
        ropes = self.ropes(positions)
        for layer in self.layers:
            z = layer(z, ropes, cache)
        return Pass(hidden=z, states={})

    def embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """``x_t``, [batch, seq, hidden], in the dtype of the residual stream."""
        x = self.embed(ids).to(self.residual_dtype)
        return x + self.positions(positions).to(x.dtype) if self.config.learned_positions else x

    def corrected(self, x: Tensor, before: Mapping[str, Tensor]) -> Tensor:
        """What enters the layers."""
        del before
        return x

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, [..., hidden] -> [..., vocab]; bounded where the configuration says so."""
        logits, cap = super().head(hidden), self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
