"""Gemma: embeddings times sqrt(hidden_size), norms that store ``gain - 1``, later two norms a branch."""

from __future__ import annotations

from dataclasses import replace

from crt_export.convert.family import Family, Folds, Names, kinds_by_interval
from crt_export.convert.keys import Keys
from crt_export.convert.llama import QK_NORMS, biased, common, configured, names
from crt_export.convert.rotary import FULL, SLIDING, read_rotary_by_layer

_TANH = "gelu_pytorch_tanh"
_CAUSAL = "tokens that see later ones are not converted"
_SANDWICH: Names = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def read_gemma(keys: Keys) -> Family:
    """``gemma``: the first one; its ``gelu`` is the tanh form whatever the file says."""
    keys.only("hidden_act", _TANH, "gelu", why="gemma knows the tanh form alone")
    keys.only("hidden_activation", _TANH, why="gemma knows the tanh form alone")
    keys.only("use_bidirectional_attention", False, why=_CAUSAL)
    usual = common(keys, act=("hidden_activation", _TANH), head_dim=256, kv_heads=16, positions=8192, tied=True)
    return replace(biased(keys, usual, mlp=False), folds=_folds(usual))


def read_gemma3(keys: Keys) -> Family:
    """``gemma3_text``: sliding layers with a base of their own, norms of queries and keys."""
    family = common(
        keys,
        rotary=False,
        act=("hidden_activation", _TANH),
        head_dim=256,
        kv_heads=4,
        positions=131072,
        tied=True,
    )
    keys.only("use_bidirectional_attention", False, why=_CAUSAL)
    keys.only("attn_logit_softcapping", None, why="scores that are capped are not converted")
    cap = keys.value("final_logit_softcapping")
    count = int(family.config["num_hidden_layers"])
    interval = keys.count("sliding_window_pattern", keys.count("_sliding_window_pattern", 6))
    kinds = keys.names("layer_types", count, (FULL, SLIDING)) or kinds_by_interval(count, interval, SLIDING, FULL)
    window, head_dim = keys.window("sliding_window", 4096), int(family.config["head_dim"])
    sets = read_rotary_by_layer(
        keys, head_dim, family.positions, theta=1e6, local_key="rope_local_base_freq", local_theta=1e4
    )
    scale = (head_dim / keys.number("query_pre_attn_scalar", 256)) ** 0.5
    family = configured(family, qk_norm="head", norm_placement="sandwich", logit_softcap=cap)
    return replace(
        biased(keys, family, mlp=False),
        layers=tuple((window if kind == SLIDING else None, sets[kind]) for kind in kinds),
        names=names(_SANDWICH, QK_NORMS),
        folds=replace(_folds(family), query=(scale,) * count),
    )


def _folds(family: Family) -> Folds:
    return Folds(gain=1.0, embedding=float(family.config["hidden_size"]) ** 0.5)
