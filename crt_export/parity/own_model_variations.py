"""Variations of this package's model that a user's own one may be, cheap to try, and the cause that one of them is.

A variation changes ``config.json``, the weights, the tokens or the regime, or edits the modules of a new model into a
form that no configuration can express. A shift of all positions is not among them: rotary attention sees differences of
positions only. Nor is a correction of the concatenation of h and x: its weights have twice the width, and reading the
checkpoint refuses them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.models.base import LanguageModel
from crt_export.models.crt import Correction
from crt_export.models.declaration import HIDDEN
from crt_export.models.layers import ACTIVATIONS, LayerNorm, Linear, Mlp
from crt_export.models.registry import model_from_checkpoint
from crt_export.models.transformer import Block, TransformerConfig
from crt_export.parity.expected_outputs import EXACT, Passes

CONFIG = "set it in config.json and build again"
UNSUPPORTED = "which this version cannot express"

_THETAS = (10_000.0, 500_000.0, 1_000_000.0, 100_000.0, 1000.0, 10_000_000.0)
_EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3)
_HEAD_FACTORS = (2.0, 0.5, 4.0, 0.25)
#: Values that are worth trying with another key's or with what no configuration can express.
_PAIRED: Mapping[str, tuple[object, ...]] = {
    "rope_layout": ("interleaved", "half"),
    "rope_theta": _THETAS[:3],
    "norm_eps": _EPSILONS[:2],
    "tie_word_embeddings": (True,),
}
_MOST_PASSES = 10
#: The key of models with a correction.
_CORRECTION = "correction_intermediate_size"
#: Forms of the activation; the package's own is F.gelu.
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "the tanh form of GELU": partial(F.gelu, approximate="tanh"),
    "the sigmoid form of GELU, x sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
    "SiLU in place of GELU": F.silu,
    "ReLU in place of GELU": F.relu,
}


@dataclass(frozen=True, kw_only=True)
class Variation:
    """One thing done otherwise."""

    words: str  # what, as it stands in a sentence: ``rope_layout = 'half'``
    advice: str  # what to do about it: CONFIG, UNSUPPORTED, or a phrase of its own
    config: Mapping[str, object] = field(default_factory=dict)  # keys of config.json and their other values
    edit: Callable[[LanguageModel], None] | None = None  # changes the modules or weights of a new model in place
    passes: Passes | None = None  # another regime; None keeps the one under test
    before: tuple[int, ...] = ()  # tokens put in front of the file's
    pair: str = ""  # what it is one value of, where it may be tried with another one; empty where it is tried alone


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What explains a difference."""

    variations: tuple[Variation, ...]  # what the user's model does otherwise
    before: float  # largest difference without it, deviations
    after: float  # with it, over all positions

    @property
    def in_config(self) -> bool:
        """Whether config.json can express it."""
        return all(variation.advice == CONFIG for variation in self.variations)

    @property
    def sentence(self) -> str:
        """With what the difference falls to what, and what to do about it."""
        words = self.data["words"]
        return f"with {words} the difference falls from {self.before:.2g} to {self.after:.1g}: {self.data['advice']}"

    @property
    def data(self) -> dict[str, Any]:
        """The cause as the report has it."""
        words = " and ".join(variation.words for variation in self.variations)
        steps = [self._step(advice) for advice in dict.fromkeys(one.advice for one in self.variations)]
        return {"words": words, "advice": "; ".join(steps), "before": self.before, "after": self.after}

    def _step(self, advice: str) -> str:
        words = [one.words for one in self.variations if one.advice == advice]
        if advice == UNSUPPORTED:
            return f"your model uses {' and '.join(words)}, {UNSUPPORTED}"
        return advice if len(words) == 1 else advice.replace("set it", "set both")


def varied_model(checkpoint: Checkpoint, candidate: Sequence[Variation]) -> LanguageModel:
    """A new model with these variations, so that an edit harms no other."""
    changes = {key: value for one in candidate for key, value in one.config.items()}
    config, tensors = dataclasses.replace(checkpoint.config, **changes), checkpoint.tensors
    if config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    model = model_from_checkpoint(dataclasses.replace(checkpoint, config=config, tensors=tensors))
    for edit in (one.edit for one in candidate if one.edit is not None):
        edit(model)
    return model


def regime_text(passes: Passes) -> str:
    """A regime in words."""
    return "the exact recurrence" if passes == EXACT else f"{passes} parallel pass{'es' * (passes != 1)}"


def variations(config: ModelConfig, passes: Passes, stated: bool, first: int) -> list[Variation]:
    """All that may be tried for a model, what a configuration can express first.

    Args:
        config: The checkpoint's.
        passes: The regime under test.
        stated: Whether the file says so itself.
        first: First position that differs.
    """
    regimes, tokens = _of_regime(config, passes, stated) if config.carried.iterated else (), _of_tokens(config)
    if not isinstance(config, TransformerConfig):
        return [*regimes, *tokens]
    return [
        *_of_config(config, first),
        *regimes,
        *_of_weights(config),
        *(_other(words, _activate, pair="gelu" * ("tanh" in words), form=form) for words, form in _ACTIVATIONS.items()),
        *(_corrections() if _CORRECTION in config.keys() else ()),
        *_of_modules(config),
        *tokens,
    ]


def _other(
    words: str, edit: Callable[..., None], advice: str = UNSUPPORTED, *, pair: str = "", **given: Any
) -> Variation:
    return Variation(words=words, advice=advice, edit=partial(edit, **given), pair=pair)


def _of_config(config: TransformerConfig, first: int) -> Iterator[Variation]:
    def other(key: str, value: object, **derived: object) -> Variation:
        shown = json.dumps(value).replace('"', "'")
        pair = key if value in _PAIRED.get(key, ()) else ""
        return Variation(words=f"{key} = {shown}", advice=CONFIG, config={key: value, **derived}, pair=pair)

    yield other("rope_layout", "half" if config.rope_layout == "interleaved" else "interleaved")
    if config.rope_theta is not None:
        yield from (other("rope_theta", theta) for theta in _THETAS if theta != config.rope_theta)
    yield from (other("activation", form) for form in ACTIVATIONS if form != config.activation)
    yield from (other("norm_eps", eps) for eps in _EPSILONS if eps != config.norm_eps)
    if not config.tie_word_embeddings:
        yield other("tie_word_embeddings", True)
    whole = config.num_key_value_heads == config.num_attention_heads
    for factor in _HEAD_FACTORS if whole and config.head_dim * config.num_attention_heads == config.hidden_size else ():
        heads = int(config.num_attention_heads * factor)
        if heads and config.hidden_size % heads == 0 and (config.hidden_size // heads) % 2 == 0:
            size = config.hidden_size // heads
            yield other("num_attention_heads", heads, num_key_value_heads=heads, head_dim=size)
    if config.sliding_window is not None:
        yield other("sliding_window", None)
    elif first > 0 and config.layer_attention is None:  # a window of W tokens is seen from position W on
        yield other("sliding_window", first)


def _of_regime(config: ModelConfig, passes: Passes, stated: bool) -> Iterator[Variation]:
    for other in (EXACT, *range(1, max(config.carried.passes, _MOST_PASSES) + 1)):
        if other != passes:
            yield Variation(
                words=regime_text(other),
                advice=f"compute your logits token by token, or save the file with metadata={{'passes': '{other}'}}",
                passes=other,
                pair="passes" if not stated and other == config.carried.passes else "",
            )


def _of_weights(config: TransformerConfig) -> Iterator[Variation]:
    transposed = "write them to model.safetensors as [out, in], as nn.Linear has them"
    for named in ("qkvo", "qkv", "o"):
        pair = "transposed" if named == "qkvo" else ""
        yield _other(f"{', '.join(named)} transposed", _transpose, transposed, pair=pair, names=tuple(named))
    square_correction = getattr(config, _CORRECTION, None) == config.hidden_size
    if config.intermediate_size == config.hidden_size or square_correction:
        yield _other("every square linear transposed", _transpose, transposed, names=(*"qkvo", "up", "down"))
        yield _other("the square up and down transposed", _transpose, transposed, names=("up", "down"))
    for one, two in ("qk", "kv", "qv"):
        yield _other(f"{one} and {two} exchanged", _exchange, "exchange them in model.safetensors", names=(one, two))
    yield _other("embed.weight times sqrt(hidden_size)", _scale_embedding, "write it so to model.safetensors")
    scale = math.sqrt(config.head_dim)
    advice = f"multiply q's weights and biases by {scale:g}"
    yield _other("attention scores that are not divided by sqrt(head_dim)", _scale_queries, advice, factor=scale)
    if not config.tie_word_embeddings:
        advice = "write embed.weight to model.safetensors as lm_head.weight too"
        yield _other("the embedding as the head's weight, with the head's bias", _tie_with_bias, advice)
    if _CORRECTION in config.keys():
        advice = "set model_type = 'transformer' and leave the correction's tensors out"
        yield _other("no correction", _correct, advice, corrected=lambda model, x, previous: x)


def _corrections() -> Iterator[Variation]:
    """Other readings of the correction; that of x alone is one parallel pass."""

    def ffn(m: Any, value: Tensor) -> Tensor:
        return m.correction.down(m.correction.activation(m.correction.up(value)))

    def normed(m: Any, previous: Tensor) -> Tensor:
        return m.final_norm(previous) * (previous != 0).any(-1, keepdim=True)  # h_{-1} stays zero

    forms: Mapping[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
        "a correction of h alone, not of h + x": lambda m, x, h: x + m.correction(h),
        "a correction of LN(h) + x": lambda m, x, h: x + ffn(m, m.correction.norm(h) + x),
        "a correction of LN(h) + LN(x)": lambda m, x, h: x + ffn(m, m.correction.norm(h) + m.correction.norm(x)),
        "a correction of h + x without its norm": lambda m, x, h: x + ffn(m, h + x),
        "a correction that is added to h + x, not to x": lambda m, x, h: h + x + m.correction(h + x),
        "a correction in place of x, not added to it": lambda m, x, h: m.correction(h + x),
        "a recurrent state after the final norm": lambda m, x, h: x + m.correction(normed(m, h) + x),
        "no correction of the first token": lambda m, x, h: x + m.correction(h + x) * (h != 0).any(-1, keepdim=True),
    }
    yield from (_other(words, _correct, corrected=form) for words, form in forms.items())


def _of_modules(config: TransformerConfig) -> Iterator[Variation]:
    yield _other("no rotary embedding", _without_rotation)
    if config.norm == "layer":
        yield _other("RMSNorm in place of LayerNorm", _rms_norms)
    yield _other("no final norm", lambda model: _replace_forward(model.final_norm, lambda x: x))
    if not config.parallel_residual:
        yield _other("attention and MLP side by side, not one after the other", _parallel_layers)


def _of_tokens(config: ModelConfig) -> Iterator[Variation]:
    candidates = dict.fromkeys((config.bos_token_id, *config.eos_token_ids, 0, 1, 2, config.vocab_size - 1))
    for token in (token for token in candidates if token is not None and token < config.vocab_size):
        yield Variation(
            words=f"token {token} in front of input_ids",
            advice="input_ids must hold all that your model was fed, with a row of logits for each; where every "
            "sequence begins with it, config.json says so as bos_token_id",
            before=(token,),
        )


# --- edits of a new model
def _activate(model: LanguageModel, form: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        if isinstance(module, Mlp | Correction):
            module.activation = form


def _correct(model: LanguageModel, corrected: Callable[[LanguageModel, Tensor, Tensor], Tensor]) -> None:
    def of_state(x: Tensor, before: Mapping[str, Tensor]) -> Tensor:
        return corrected(model, x, before[HIDDEN])

    setattr(model, "corrected", of_state)  # noqa: B010  # a method of this one model


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    setattr(module, "forward", forward)  # noqa: B010  # of this one module


def _transpose(model: LanguageModel, names: tuple[str, ...]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.rpartition(".")[2] in names:
            into, out = module.weight.shape
            if into == out:
                module.weight = nn.Parameter(module.weight.T.contiguous(), requires_grad=False)


def _exchange(model: LanguageModel, names: tuple[str, str]) -> None:
    for layer in _layers(model):
        one, two = (getattr(layer.attn, name) for name in names)
        setattr(layer.attn, names[0], two)
        setattr(layer.attn, names[1], one)


def _scale_embedding(model: Any) -> None:
    model.embed.weight.data = model.embed.weight * math.sqrt(model.config.hidden_size)


def _scale_queries(model: LanguageModel, factor: float) -> None:
    for layer in _layers(model):
        for parameter in layer.attn.q.parameters():
            parameter.data = parameter * factor


def _tie_with_bias(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.embed.weight.T.contiguous(), requires_grad=False)


def _without_rotation(model: LanguageModel) -> None:
    for name, table in model.named_buffers():
        table.copy_(torch.ones_like(table) if name.startswith("rope_cos") else torch.zeros_like(table))


def _rms_norms(model: LanguageModel) -> None:
    def rms(x: Tensor, norm: LayerNorm) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias

    for module in model.modules():
        if isinstance(module, LayerNorm):
            _replace_forward(module, partial(rms, norm=module))


def _parallel_layers(model: LanguageModel) -> None:
    for layer in _layers(model):
        layer.parallel = True


def _layers(model: Any) -> Iterator[Block]:
    return (layer for layer in model.layers if isinstance(layer, Block))
