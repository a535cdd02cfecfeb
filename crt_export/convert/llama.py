"""``model.layers.{i}.self_attn.q_proj``: Llama and everything that was written after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from crt_export.convert.family import ATTENTION, MLP, QKV, Family, Folds, Fused, Layer, Names, activation, sizes, table
from crt_export.convert.keys import Keys
from crt_export.convert.rotary import FULL, SLIDING, read_rotary
from crt_export.errors import UnsupportedError

PREFIXES = ("model.", "")
_ATTENTION: Names = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
}
_MLP: Names = {"mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}
PRE_NORMS: Names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
QK_NORMS: Names = {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
MODEL: Names = {"embed_tokens": "embed", "norm": "final_norm", "lm_head": "lm_head"}
#: What most of these families have where their file names nothing; a head_dim of 0 is always hidden_size / heads.
_DEFAULTS: Mapping[str, Any] = {
    "eps": ("rms_norm_eps", 1e-6),
    "act": ("hidden_act", "silu"),
    "kv_heads": None,
    "head_dim": None,
    "theta": 10000.0,
    "partial": None,
    "positions": 2048,
    "tied": False,
}


def names(norms: Names, *others: Names) -> Names:
    """The table with the norms of a layer and what else it has."""
    layer: dict[str, Any] = {**_ATTENTION, **_MLP, **norms}
    for other in others:
        layer |= other
    return table("layers.{i}.", layer, MODEL)


def common(keys: Keys, *, rotary: bool = True, **changed: Any) -> Family:
    """What all these families share.

    Args:
        keys: Of ``config.json``.
        rotary: Whether all layers turn keys alike; if not, the family adds its ``layers``.
        changed: Defaults of the family that differ from the usual ones.
    """
    default = {**_DEFAULTS, **changed}
    found = sizes(keys)
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    head_dim = hidden // heads
    if default["head_dim"] == 0:
        keys.only("head_dim", head_dim, why="it contradicts hidden_size and num_attention_heads")
    else:
        head_dim = keys.count("head_dim", default["head_dim"] or head_dim)
    positions = keys.count("max_position_embeddings", default["positions"])
    config = {
        **found,
        "num_key_value_heads": keys.count("num_key_value_heads", default["kv_heads"] or heads),
        "head_dim": head_dim,
        "norm": "rms",
        "norm_eps": keys.number(*default["eps"]),
        "activation": activation(keys, *default["act"]),
        "gated_mlp": True,
        "rope_layout": "half",
        "tie_word_embeddings": default["tied"],
    }
    layers: tuple[Layer, ...] = ()
    if rotary:
        turned = read_rotary(keys, head_dim, positions, theta=default["theta"], partial=default["partial"])
        layers = ((None, turned),) * found["num_hidden_layers"]
    return Family(config=config, positions=positions, layers=layers, names=names(PRE_NORMS), prefixes=PREFIXES)


def biased(keys: Keys, family: Family, *, mlp: bool = True) -> Family:
    """The family with the biases that ``attention_bias`` and ``mlp_bias`` ask for."""
    found = ATTENTION if keys.flag("attention_bias", False) else frozenset()
    if mlp and keys.flag("mlp_bias", False):
        found |= MLP
    return replace(family, biased=family.biased | found)


def windowed(family: Family, window: int | None, kinds: list[str] | None = None) -> Family:
    """The family with a window on all layers, or on those that slide."""
    kinds = kinds or [SLIDING] * len(family.layers)
    if window is None and SLIDING in kinds and FULL in kinds:
        raise UnsupportedError("config.json: layer_types has sliding layers, and there is no sliding_window")
    layers = [
        (window if kind == SLIDING else None, turned) for kind, (_, turned) in zip(kinds, family.layers, strict=True)
    ]
    return replace(family, layers=tuple(layers))


def configured(family: Family, **values: Any) -> Family:
    """The family with other keys of ours."""
    return replace(family, config={**family.config, **values})


def read_llama(keys: Keys) -> Family:
    """``llama``: Llama 1 to 3, TinyLlama, SmolLM 1 and 2, and many others."""
    keys.only("rope_interleaved", False, why="not known for llama")
    return biased(keys, common(keys))


def read_mistral(keys: Keys) -> Family:
    """``mistral``."""
    keys.only("layer_types", None, why="windows that alternate are not converted for mistral")
    return windowed(common(keys, kv_heads=8, positions=131072), keys.window("sliding_window", 4096))


def _qwen_windows(keys: Keys, family: Family) -> Family:
    count, first = len(family.layers), keys.whole("max_window_layers", 28)
    used, window = keys.flag("use_sliding_window", False), keys.window("sliding_window", 4096)
    kinds = keys.names("layer_types", count, (FULL, SLIDING))
    if not used or window is None:
        keys.only("layer_types", [FULL] * count, why="sliding layers without use_sliding_window")
        return family
    if kinds is None:
        kinds = [SLIDING if index >= first else FULL for index in range(count)]
    return windowed(family, window, kinds)


def read_qwen2(keys: Keys) -> Family:
    """``qwen2``: Qwen 2 and 2.5; biases of queries, keys and values alone."""
    keys.only("use_mrope", False, why="not known for qwen2")
    family = common(keys, kv_heads=None, positions=32768)
    return _qwen_windows(keys, replace(family, biased=frozenset(QKV)))


def read_qwen3(keys: Keys) -> Family:
    """``qwen3``: a norm of queries and keys, shared by the heads."""
    family = biased(keys, common(keys, head_dim=128, positions=32768), mlp=False)
    family = replace(configured(family, qk_norm="head"), names=names(PRE_NORMS, QK_NORMS))
    return _qwen_windows(keys, family)


def read_phi3(keys: Keys) -> Family:
    """``phi3``: Phi-3 with the short context, and Phi-4; fused projections."""
    for name in ("rope_scaling", "rope_parameters"):
        found = keys.mapping(name) or {}
        kind = found.get("rope_type", found.get("type", "default"))
        if kind != "default":  # transformers takes yarn and su for longrope here
            raise UnsupportedError(
                f"config.json: {name} of type {kind!r:.40}: the frequencies of longrope change with the length of the "
                "text, keys that are cached do not; take the sibling with the short context, Phi-3-mini-4k"
            )
    keys.skip("original_max_position_embeddings")
    family = common(keys, eps=("rms_norm_eps", 1e-5), positions=4096, head_dim=0, partial=1.0)
    fused: Names = {
        "self_attn.qkv_proj": Fused(parts=QKV),
        "self_attn.o_proj": "attn.o",
        "mlp.gate_up_proj": Fused(parts=("mlp.gate", "mlp.up")),
        "mlp.down_proj": "mlp.down",
    }
    family = replace(family, names=table("layers.{i}.", {**fused, **PRE_NORMS}, MODEL))
    keys.only("attention_bias", False, why="not known for phi3")
    keys.only("mlp_bias", False, why="not known for phi3")
    return windowed(family, keys.window("sliding_window", None))


def read_smollm3(keys: Keys) -> Family:
    """``smollm3``: every fourth layer turns no keys."""
    family = biased(keys, common(keys, kv_heads=4, positions=32768, theta=2000000.0, tied=True, head_dim=0))
    keys.skip("max_window_layers")  # its layer_types decide
    count, interval = len(family.layers), keys.count("no_rope_layer_interval", 4)
    turned = keys.names("no_rope_layers", count, (0, 1))
    turned = turned or [int((index + 1) % interval != 0) for index in range(count)]
    used, window = keys.flag("use_sliding_window", False), keys.window("sliding_window", None)
    kinds = keys.names("layer_types", count, (FULL, SLIDING))
    if kinds is None:
        kinds = [FULL if turned[index] else SLIDING for index in range(count)]
    window = window if used else None
    layers = [
        (window if kind == SLIDING else None, rotary if turns else None)
        for kind, turns, (_, rotary) in zip(kinds, turned, family.layers, strict=True)
    ]
    return replace(family, layers=tuple(layers))


def read_granite(keys: Keys) -> Family:
    """``granite``: multipliers of embeddings, attention, branches and logits."""
    family = biased(keys, common(keys))
    scale = keys.number("attention_multiplier", 1.0) * float(family.config["head_dim"]) ** 0.5
    folds = Folds(
        embedding=keys.number("embedding_multiplier", 1.0),
        logits=1.0 / keys.number("logits_scaling", 1.0),
        branch=keys.number("residual_multiplier", 1.0),
        query=(scale,) * len(family.layers),
    )
    return replace(family, folds=folds)
