"""Family of models under one naming scheme: our keys, a table of names, and what is folded into its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crt_export.config import MOST_LAYERS
from crt_export.convert.keys import REQUIRED, Keys
from crt_export.convert.rotary import RotarySet
from crt_export.errors import CheckpointError, UnsupportedError

#: Activation of transformers to ours; all of these are the tanh form, however they are written.
ACTIVATIONS: Mapping[str, str] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}
QKV = ("attn.q", "attn.k", "attn.v")
ATTENTION = frozenset((*QKV, "attn.o"))
MLP = frozenset(("mlp.gate", "mlp.up", "mlp.down"))
NORMS = frozenset(("attn_norm", "mlp_norm", "final_norm"))
#: What stands before the modules of a layer of ours.
LAYER = "layers.{i}."
#: Window and rotary set of one layer, None for none.
Layer = tuple[int | None, RotarySet | None]


@dataclass(frozen=True, kw_only=True)
class Fused:
    """One tensor that holds several of ours.

    Attributes:
        parts: Ours, in their order in it.
        grouped: Whether they alternate: queries of a group, its key, its value, next group; else block after block.
    """

    parts: tuple[str, ...]
    grouped: bool = False


#: Their module to ours; to several of ours that are copies of it; or to several that it holds.
Names = Mapping[str, str | tuple[str, ...] | Fused]


@dataclass(frozen=True, kw_only=True)
class Folds:
    """Arithmetic that goes into the weights, exact but for one rounding in float32.

    Attributes:
        gain: Added to the gain of every norm: 1 where a family stores ``gain - 1``.
        embedding: Factor of the embeddings.
        logits: Factor of the logits.
        branch: Factor of what attention and MLP add to the residual stream.
        query: Factor of the queries of each layer, besides ``head_dim^-0.5``; 1 for all where it is empty.
        position_offset: Rows of the learned positions before the first.
        transposed: Whether linears are stored as [in, out].
    """

    gain: float = 0.0
    embedding: float = 1.0
    logits: float = 1.0
    branch: float = 1.0
    query: tuple[float, ...] = ()
    position_offset: int = 0
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model as its family's file understood it.

    Attributes:
        config: Keys of :class:`crt_export.models.transformer.TransformerConfig` but those about positions, biases and
            tokens.
        positions: ``max_position_embeddings`` of the source.
        layers: Window and rotary set of each layer.
        names: Table of names within the model; ``{i}`` is the layer.
        prefixes: What may stand before all of them but the head; the first that fits is taken.
        biased: Modules of ours, without their layer, that have a bias in the source; others of a model with biases get
            zeros.
        bare: Modules of ours that have no tensors at all in the source: their gain is 1 and their bias 0.
        per_head: Modules of ours whose gain of each head is a tensor of its own, ``{module}.{head}.weight``.
        folds: Arithmetic.
    """

    config: Mapping[str, Any]
    positions: int
    layers: Sequence[Layer]
    names: Names
    prefixes: tuple[str, ...]
    biased: frozenset[str] = frozenset()
    bare: frozenset[str] = frozenset()
    per_head: frozenset[str] = frozenset()
    folds: Folds = field(default_factory=Folds)


def table(prefix: str, layer: Names, model: Names) -> Names:
    """The names of a model.

    Args:
        prefix: What stands before the modules of a layer of theirs, ``{i}`` being its number.
        layer: Modules of a layer, theirs to ours.
        model: All others.
    """

    def of_layer(ours: str | tuple[str, ...] | Fused) -> str | tuple[str, ...] | Fused:
        if isinstance(ours, Fused):
            return Fused(parts=tuple(LAYER + name for name in ours.parts), grouped=ours.grouped)
        return LAYER + ours if isinstance(ours, str) else tuple(LAYER + name for name in ours)

    return {**model, **{prefix + theirs: of_layer(ours) for theirs, ours in layer.items()}}


def activation(keys: Keys, name: str, default: str) -> str:
    """Our name of the activation that a key names.

    Raises:
        UnsupportedError: There is no such activation here.
    """
    found = keys.text(name, default)
    if found not in ACTIVATIONS:
        raise UnsupportedError(f"config.json: {name} {found!r:.40}: known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[found]


def sizes(
    keys: Keys,
    *,
    hidden: str = "hidden_size",
    layers: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
    inner: str = "intermediate_size",
    inner_default: Any = REQUIRED,
) -> dict[str, int]:
    """The sizes that every family has, by what it calls them."""
    found = {
        "vocab_size": keys.count("vocab_size"),
        "hidden_size": keys.count(hidden),
        "num_hidden_layers": keys.count(layers),
        "num_attention_heads": keys.count(heads),
    }
    if found["num_hidden_layers"] > MOST_LAYERS:
        raise CheckpointError(
            f"config.json: {layers} must be at most {MOST_LAYERS}, found {found['num_hidden_layers']}"
        )
    if inner_default is None:
        inner_default = 4 * found["hidden_size"]
    return {**found, "intermediate_size": keys.count(inner, inner_default)}


def kinds_by_interval(count: int, interval: int, usual: str, other: str) -> list[str]:
    """A kind for each layer, every ``interval``-th one being of the other kind."""
    return [other if (index + 1) % interval == 0 else usual for index in range(count)]
