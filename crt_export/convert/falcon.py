"""Falcon: queries, keys and values fused by groups; the one of 7 B has a single group and one norm."""

from __future__ import annotations

from crt_export.convert.family import ATTENTION, MLP, NORMS, QKV, Family, Fused, Names, activation, sizes, table
from crt_export.convert.keys import Keys
from crt_export.convert.rotary import read_rotary

_MODEL: Names = {"word_embeddings": "embed", "ln_f": "final_norm", "lm_head": "lm_head"}


def read_falcon(keys: Keys) -> Family:
    """``falcon``."""
    keys.only("alibi", False, why="alibi, a bias of scores by distance, is not converted")
    keys.only("apply_residual_connection_post_layernorm", False, why="not known for falcon")
    found = sizes(keys, inner="ffn_hidden_size", inner_default=None)
    heads, positions = found["num_attention_heads"], keys.count("max_position_embeddings", 2048)
    grouped, single = keys.flag("new_decoder_architecture", False), keys.flag("multi_query", True)
    groups = keys.count("num_kv_heads", heads)
    parallel = keys.flag("parallel_attn", True)
    norms = keys.count("num_ln_in_parallel_attn", 2 if grouped else 1)
    config = {
        **found,
        "num_key_value_heads": groups if grouped or not single else 1,
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "activation": activation(keys, "activation", "gelu"),
        "parallel_residual": grouped or parallel,
        "rope_layout": "half",
        "tie_word_embeddings": True,
    }
    linears = ATTENTION | MLP if keys.flag("bias", False) else frozenset()
    rotary = read_rotary(keys, found["hidden_size"] // heads, positions)
    return Family(
        config=config,
        positions=positions,
        layers=((None, rotary),) * found["num_hidden_layers"],
        names=table("h.{i}.", {**_LAYER, **_norms(grouped, parallel, norms)}, _MODEL),
        prefixes=("transformer.", ""),
        biased=NORMS | linears,
    )


_LAYER: Names = {
    "self_attention.query_key_value": Fused(parts=QKV, grouped=True),
    "self_attention.dense": "attn.o",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}


def _norms(grouped: bool, parallel: bool, count: int) -> Names:
    if not (grouped or parallel):
        return {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    if grouped and count == 2:
        return {"ln_attn": "attn_norm", "ln_mlp": "mlp_norm"}
    return {"input_layernorm": ("attn_norm", "mlp_norm")}
