"""GPT-NeoX and Pythia: queries, keys and values interleaved by head."""

from __future__ import annotations

from crt_export.convert.family import ATTENTION, MLP, NORMS, QKV, Family, Fused, Names, activation, sizes, table
from crt_export.convert.keys import Keys
from crt_export.convert.rotary import read_rotary

_LAYER: Names = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": Fused(parts=QKV, grouped=True),
    "attention.dense": "attn.o",
    "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
_MODEL: Names = {
    "embed_in": "embed",
    "final_layer_norm": "final_norm",
    "embed_out": "lm_head",  # on disk
    "lm_head": "lm_head",  # what transformers 5 calls it
}


def read_gpt_neox(keys: Keys) -> Family:
    """``gpt_neox``."""
    found = sizes(keys)
    positions = keys.count("max_position_embeddings", 2048)
    head_dim = found["hidden_size"] // found["num_attention_heads"]
    theta, partial = keys.number("rotary_emb_base", 10000.0), keys.number("rotary_pct", 0.25)
    keys.only("rope_theta", theta, why="it contradicts rotary_emb_base")
    keys.only("partial_rotary_factor", partial, why="it contradicts rotary_pct")
    rotary = read_rotary(keys, head_dim, positions, theta=theta, partial=partial)
    config = {
        **found,
        "norm_eps": keys.number("layer_norm_eps", 1e-5),
        "activation": activation(keys, "hidden_act", "gelu"),
        "parallel_residual": keys.flag("use_parallel_residual", True),
        "rope_layout": "half",
        "tie_word_embeddings": False,
    }
    return Family(
        config=config,
        positions=positions,
        layers=((None, rotary),) * found["num_hidden_layers"],
        names=table("layers.{i}.", _LAYER, _MODEL),
        prefixes=("gpt_neox.", ""),
        biased=NORMS | MLP | (ATTENTION if keys.flag("attention_bias", True) else frozenset()),
    )
