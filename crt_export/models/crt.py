"""Context-ready transformer (CRT): a transformer whose input is corrected by the output of the token before.

Written from the equations of M. Godavarti, "The Context-Ready Transformer", arXiv 2606.27538::

    x_t  = E[token_t]
    c_t  = W2 gelu(W1 LN_c(h_{t-1} + x_t) + b1) + b2          correction, C -> G -> C
    z^0  = x_t + c_t                                          always added to the raw embedding
    h_t  = z^D                                                un-normalised: the recurrent state, h_{-1} = 0
    logits_t = W_head LN_f(h_t) + b_head

with the layers of :mod:`crt_export.models.transformer`. The correction has biases, a LayerNorm and the exact GELU,
whatever the layers have. Its tensors are ``correction.norm``, ``correction.up`` and ``correction.down``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from crt_export.cache import Cache
from crt_export.config import MOST_PASSES, Key, count
from crt_export.models.base import Pass
from crt_export.models.declaration import HIDDEN, Carried, StateSpec
from crt_export.models.layers import Activation, DeclaresLinears, LayerNorm, Linear
from crt_export.models.transformer import Transformer, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class CrtConfig(TransformerConfig):
    """A transformer's keys, the width G of the correction, and the passes K that the model was trained for."""

    KEYS: ClassVar[Mapping[str, Key]] = {
        **TransformerConfig.KEYS,
        "correction_intermediate_size": count(),
        "unroll_steps": count(most=MOST_PASSES),
    }
    IGNORED: ClassVar[tuple[str, ...]] = ()

    correction_intermediate_size: int
    unroll_steps: int

    def declare(self) -> Carried:
        """A transformer's caches, and h."""
        state = StateSpec(name=HIDDEN, shape=(self.hidden_size,))
        return replace(super().declare(), states=(state,), passes=self.unroll_steps)


class Correction(nn.Module, DeclaresLinears):
    """``c = W2 gelu(W1 LN_c(u) + b1) + b2`` of the sum ``u = h_{t-1} + x_t``."""

    #: An attribute, so that crt_export.parity.own_model_causes can try another form.
    activation: Activation = staticmethod(F.gelu)
    one_sided = ("down",)

    def __init__(self, config: CrtConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.up = Linear(config.hidden_size, config.correction_intermediate_size)
        self.down = Linear(config.correction_intermediate_size, config.hidden_size)

    def forward(self, u: Tensor) -> Tensor:
        return self.down(self.activation(self.up(self.norm(u))))


class ContextReadyTransformer(Transformer):
    """A transformer with the correction; a chunk takes K passes, or one for each of its tokens."""

    config_class = CrtConfig

    def add_correction(self) -> None:
        """Add the correction."""
        self.correction = Correction(self.config)

    def corrected(self, x: Tensor, before: Mapping[str, Tensor]) -> Tensor:
        """``x_t + c(h_{t-1} + x_t)``, [batch, seq, hidden]."""
        return x + self.correction(before[HIDDEN] + x).to(x.dtype)

    def run_pass(self, ids: Tensor, before: Mapping[str, Tensor], position: Tensor, cache: Cache) -> Pass:
        """One pass over a chunk; h is what the head reads and what the next token is corrected by."""
        hidden = super().run_pass(ids, before, position, cache).hidden
        return Pass(hidden=hidden, states={HIDDEN: hidden})
