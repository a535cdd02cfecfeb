"""OPT: learned positions that begin with the third row, and ``final_layer_norm`` as the name of two things."""

from __future__ import annotations

from crt_export.convert.family import ATTENTION, MLP, NORMS, Family, Folds, Names, activation, sizes, table
from crt_export.convert.keys import Keys

_LAYER: Names = {
    "self_attn_layer_norm": "attn_norm",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.o",
    "final_layer_norm": "mlp_norm",
    "fc1": "mlp.up",
    "fc2": "mlp.down",
}
_MODEL: Names = {
    "embed_tokens": "embed",
    "embed_positions": "positions",
    "final_layer_norm": "final_norm",
    "lm_head": "lm_head",
}
_OFFSET = 2


def read_opt(keys: Keys) -> Family:
    """``opt``: all but the one of 350 M, whose norms come after the sum."""
    found = sizes(keys, inner="ffn_dim")
    positions = keys.count("max_position_embeddings", 2048)
    keys.only("do_layer_norm_before", True, why="norms after the sum are not converted")
    keys.only("word_embed_proj_dim", found["hidden_size"], why="projected embeddings are not converted")
    keys.only("_remove_final_layer_norm", False, why="a model without its last norm is not converted")
    keys.only("layer_norm_elementwise_affine", True, why="not known for opt")
    config = {
        **found,
        "norm_eps": 1e-5,
        "activation": activation(keys, "activation_function", "relu"),
        "learned_positions": True,
        "tie_word_embeddings": True,
    }
    return Family(
        config=config,
        positions=positions,
        layers=((None, None),) * found["num_hidden_layers"],
        names=table("layers.{i}.", _LAYER, _MODEL),
        prefixes=("model.decoder.", "decoder.", ""),
        biased=NORMS | (ATTENTION | MLP if keys.flag("enable_bias", True) else frozenset()),
        folds=Folds(position_offset=_OFFSET),
    )
