"""The reference model: context-ready transformer (CRT) and plain transformer, in PyTorch.

Written from the equations of M. Godavarti, "The Context-Ready Transformer", arXiv 2606.27538::

    x_t  = E[token_t]
    c_t  = W2 gelu(W1 LN_c(h_{t-1} + x_t) + b1) + b2          correction, C -> G -> C
    z^0  = x_t + c_t                                          always added to the raw embedding
    a    = z^{i-1} + Wo Attn_i(LN1_i(z^{i-1}))                causal, rotary q and k
    z^i  = a + W_down gelu(W_up LN2_i(a))
    h_t  = z^D                                                un-normalised: the recurrent state, h_{-1} = 0
    logits_t = W_head LN_f(h_t) + b_head

A plain transformer is the same with c_t = 0 and no state. With a sliding window of W, attention sees the latest W
tokens, the token itself included. This one model is what parity is measured against, what calibration observes and
what the graphs are exported from. Linears hold their weight as [in, out].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crt_export.cache import AppendedCache, Cache, GrowingCache
from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import InputError, UnsupportedError, problem_list
from crt_export.rotary import rope_at, rope_tables, rotate


class Linear(nn.Module):
    """``y = x @ weight + bias`` with weight [in, out], so that no exported graph transposes a weight."""

    def __init__(self, into: int, out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(into, out))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class LayerNorm(nn.Module):
    """LayerNorm computed in the dtype of its input, delivered in the dtype of its weights."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.zeros(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)


class Correction(nn.Module):
    """``c = W2 gelu(W1 LN_c(u) + b1) + b2`` of the sum ``u = h_{t-1} + x_t``."""

    #: An attribute, so that crt_export.parity.own_model_variations can try another form.
    activation: Callable[[Tensor], Tensor] = staticmethod(F.gelu)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.correction_intermediate_size or 0
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.up = Linear(config.hidden_size, inner)
        self.down = Linear(inner, config.hidden_size)

    def forward(self, u: Tensor) -> Tensor:
        return self.down(self.activation(self.up(self.norm(u))))


class Attention(nn.Module):
    """Causal multi-head attention with rotary q and k over the keys a cache provides."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim, self.rope_layout = (
            config.num_attention_heads,
            config.head_dim,
            config.rope_layout,
        )
        hidden = config.hidden_size
        self.q, self.k, self.v, self.o = (Linear(hidden, hidden) for _ in range(4))

    def forward(self, x: Tensor, rope: tuple[Tensor, ...], layer: int, cache: Cache) -> Tensor:
        q, k, v = (self._heads(projection(x)) for projection in (self.q, self.k, self.v))
        keys, values = cache.extend(layer, rotate(k, rope, self.rope_layout), v)
        q = rotate(q, rope, self.rope_layout)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=cache.mask, scale=self.head_dim**-0.5)
        return self.o(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, heads, seq, head_dim]."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """``W_down gelu(W_up x)`` with biases, C -> F -> C."""

    activation: Callable[[Tensor], Tensor] = staticmethod(F.gelu)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """One pre-norm transformer layer; the residual stream ``z`` keeps its own dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, z: Tensor, rope: tuple[Tensor, ...], layer: int, cache: Cache) -> Tensor:
        a = z + self.attn(self.attn_norm(z), rope, layer, cache).to(z.dtype)
        return a + self.mlp(self.mlp_norm(a)).to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class Carry:
    """What decoding continues from.

    Attributes:
        state: h of the last token, [batch, 1, hidden]; zeros before the first token (unused by a plain transformer).
        keys: Per layer, rotated keys of all past tokens, [batch, heads, past, head_dim].
        values: Likewise the values.
        position: Number of past tokens per row, int64 [batch]; all rows are equal in the reference.
    """

    state: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    position: Tensor


class Model(nn.Module):
    """CRT or plain transformer; all sequences of a batch have one length and one position."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.correction = Correction(config) if config.recurrent else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=not config.tie_word_embeddings)
        cos, sin = rope_tables(config.max_position_embeddings, config.head_dim, config.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.residual_dtype: torch.dtype | None = None

    def run_pass(self, ids: Tensor, previous: Tensor | None, position: Tensor, cache: Cache) -> Tensor:
        """One pass over a chunk, all positions in parallel.

        Args:
            ids: Token ids, int64 [batch, seq].
            previous: h of the token before each one, [batch, seq, hidden]; None for a plain transformer.
            position: Tokens already in the cache, int64 [batch].
            cache: Takes each layer's new keys and values and hands back what to attend over.

        Returns:
            h, [batch, seq, hidden], in the dtype of the residual stream.
        """
        z = self.corrected(self.embed(ids).to(self.residual_dtype), previous)
        positions = position[:, None] + torch.arange(ids.shape[1], device=ids.device)
        rope = rope_at((self.rope_cos, self.rope_sin), positions)
        for index, layer in enumerate(self.layers):
            z = layer(z, rope, index, cache)
        return z

    def corrected(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """``x~_t = x_t + c(h_{t-1} + x_t)``, [batch, seq, hidden]; a plain transformer takes x as it is."""
        if self.correction is None:
            return x
        assert previous is not None
        return x + self.correction(previous + x).to(x.dtype)

    def head(self, h: Tensor) -> Tensor:
        """``logits = W_head LN_f(h) + b_head``, [..., hidden] -> [..., vocab]."""
        return self.lm_head(self.final_norm(h))

    def unroll(
        self, ids: Tensor, passes: int, carry: Carry | None = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, Carry, Tensor]:
        """K parallel passes: Jacobi iteration on the recurrence, ``h^(k)_t = Blocks(x + c(h^(k-1)_{t-1} + x))_t``.

        Args:
            ids: Token ids, int64 [batch, seq].
            passes: K, at least 1. A plain transformer needs one and gains nothing from more.
            carry: Where to continue from; None starts a sequence.
            hidden: First iterate h^(0), [batch, seq, hidden]; None is zeros.

        Returns:
            ``h^(K)`` [batch, seq, hidden], the carry of the last pass, and
            ``max |h^(K) - h^(K-1)|`` per row [batch].

        Raises:
            InputError: ``passes`` is below 1.
        """
        if passes < 1:
            raise InputError(f"number of passes K must be at least 1, found {passes}")
        carry = self.start(ids.shape[0]) if carry is None else carry
        h = carry.state.new_zeros(*ids.shape, self.config.hidden_size) if hidden is None else hidden
        seq, window = ids.shape[1], self.config.sliding_window
        before, cache = h, AppendedCache(carry.keys, carry.values, carry.position, seq, window)
        for _ in range(passes):
            cache = AppendedCache(carry.keys, carry.values, carry.position, seq, window)
            before, h = h, self.run_pass(ids, shift(carry.state, h), carry.position, cache)
        after = Carry(
            state=h[:, -1:],
            keys=tuple(cache.keys),
            values=tuple(cache.values),
            position=carry.position + seq,
        )
        return h, after, (h - before).abs().amax(dim=(1, 2))

    @torch.no_grad()
    def sequential(self, ids: Tensor, carry: Carry | None = None) -> tuple[Tensor, Carry]:
        """The exact recurrence, one token at a time: h [batch, seq, hidden] and the carry after it."""
        carry = self.start(ids.shape[0]) if carry is None else carry
        cache = GrowingCache(carry.keys, carry.values, ids.shape[1], self.config.sliding_window)
        state, position, states = carry.state, carry.position, []
        for t in range(ids.shape[1]):
            state = self.run_pass(ids[:, t : t + 1], state, position, cache)
            position = position + 1
            states.append(state)
        return torch.cat(states, 1), Carry(
            state=state, keys=tuple(cache.keys), values=tuple(cache.values), position=position
        )

    def step(self, ids: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """One token of the recurrence, ids int64 [batch, 1]: the same function as one pass over a chunk of one."""
        h, after, _ = self.unroll(ids, 1, carry)
        return h, after

    def start(self, batch: int) -> Carry:
        """The carry before the first token: h_{-1} = 0, nothing cached."""
        config = self.config
        state = self.final_norm.weight.new_zeros(batch, 1, config.hidden_size, dtype=self.residual_dtype)
        empty = self.final_norm.weight.new_zeros(batch, config.num_attention_heads, 0, config.head_dim)
        layers = (empty,) * config.num_hidden_layers
        return Carry(state=state, keys=layers, values=layers, position=state.new_zeros(batch, dtype=torch.int64))


def shift(state: Tensor, h: Tensor) -> Tensor:
    """``s_t = h_{t-1}``, ``s_0 = state``: [batch, 1, hidden] and [batch, seq, hidden] -> [batch, seq, hidden]."""
    return torch.cat([state, h], dim=1)[:, :-1]


def model_from_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, residual_dtype: torch.dtype | None = None
) -> Model:
    """Build the model in evaluation mode, with weights in ``dtype`` and the residual stream in ``residual_dtype``.

    Raises:
        UnsupportedError: A weight does not fit into ``dtype``.
    """
    limit = torch.finfo(dtype).max
    beyond = [
        f"{name}: largest |weight| {float(tensor.abs().max()):.6g}"
        for name, tensor in checkpoint.tensors.items()
        if float(tensor.abs().max()) > limit
    ]
    if beyond:
        where = f"{checkpoint.path}: weights beyond the largest {str(dtype).removeprefix('torch.')} value {limit:g}"
        raise UnsupportedError(problem_list(f"{where} (use an fp32 or w8 target, or rescale them)", beyond))
    with torch.device("meta"):
        model = Model(checkpoint.config)
    cos, sin = rope_tables(
        checkpoint.config.max_position_embeddings, checkpoint.config.head_dim, checkpoint.config.rope_theta
    )
    model.rope_cos, model.rope_sin = cos, sin
    model.load_state_dict(state_dict_from_tensors(dict(checkpoint.tensors)), assign=True)
    model.residual_dtype = dtype if residual_dtype is None else residual_dtype
    return model.to(dtype).eval().requires_grad_(False)


def state_dict_from_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint tensors -> parameters of :class:`Model`; linears [out, in] become [in, out], a tied head a copy."""
    head = {} if "lm_head.weight" in tensors else {"lm_head.weight": tensors["embed.weight"]}
    return {
        name: tensor.T.contiguous() if tensor.ndim == 2 and name != "embed.weight" else tensor.clone()
        for name, tensor in {**tensors, **head}.items()
    }


def tensors_from_model(model: Model) -> dict[str, Tensor]:
    """The inverse of :func:`state_dict_from_tensors`: what ``model.safetensors`` stores, linears as [out, in]."""
    return {
        name: tensor.T.contiguous() if tensor.ndim == 2 and name != "embed.weight" else tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }
