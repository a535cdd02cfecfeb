"""Cohere: one layer norm for attention and MLP, which read the same, and interleaved rotary embeddings."""

from __future__ import annotations

from dataclasses import replace

from crt_export.convert.family import Family, Folds, Names, kinds_by_interval
from crt_export.convert.keys import Keys
from crt_export.convert.llama import QK_NORMS, biased, common, configured, names
from crt_export.convert.rotary import FULL, SLIDING

_ONE: Names = {"input_layernorm": ("attn_norm", "mlp_norm")}


def read_cohere(keys: Keys) -> Family:
    """``cohere``: Command R and Aya."""
    family = _family(keys, theta=500000.0)
    keys.skip("model_max_length")
    if not keys.flag("use_qk_norm", False):
        return family
    return replace(configured(family, qk_norm="head"), names=names(_ONE, QK_NORMS))


def read_cohere2(keys: Keys) -> Family:
    """``cohere2``: sliding layers turn keys, the others see all tokens and turn none."""
    family = _family(keys, theta=10000.0)
    keys.only("position_embedding_type", "rope_gptj", why="not known for cohere2")
    keys.only("order_of_interleaved_layers", "local_attn_first", why="not known for cohere2")
    keys.only("rotary_pct", 1.0, 1, why="not known for cohere2")
    keys.only("use_gated_activation", True, why="not known for cohere2")
    keys.only("use_parallel_block", True, why="not known for cohere2")
    keys.only("use_qk_norm", False, why="not known for cohere2")
    keys.skip("layer_switch", "use_embedding_sharing", "use_parallel_embedding")
    count = len(family.layers)
    interval = keys.count("sliding_window_pattern", keys.count("_sliding_window_pattern", 4))
    kinds = keys.names("layer_types", count, (FULL, SLIDING)) or kinds_by_interval(count, interval, SLIDING, FULL)
    window = keys.window("sliding_window", 4096)
    layers = tuple(
        (window, turned) if kind == SLIDING else (None, None)
        for kind, (_, turned) in zip(kinds, family.layers, strict=True)
    )
    return replace(family, layers=layers)


def _family(keys: Keys, theta: float) -> Family:
    usual = common(keys, eps=("layer_norm_eps", 1e-5), positions=8192, theta=theta, tied=True)
    family = configured(biased(keys, usual, mlp=False), norm="layer", parallel_residual=True, rope_layout="interleaved")
    return replace(family, names=names(_ONE), folds=Folds(logits=keys.number("logit_scale", 0.0625)))
