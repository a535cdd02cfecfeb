"""GPT-J: one norm for both branches, interleaved rotary embeddings, a head with a bias."""

from __future__ import annotations

from crt_export.convert.family import MLP, NORMS, Family, Names, activation, sizes, table
from crt_export.convert.keys import Keys
from crt_export.convert.rotary import rotary_set

_LAYER: Names = {
    "ln_1": ("attn_norm", "mlp_norm"),
    "attn.q_proj": "attn.q",
    "attn.k_proj": "attn.k",
    "attn.v_proj": "attn.v",
    "attn.out_proj": "attn.o",
    "mlp.fc_in": "mlp.up",
    "mlp.fc_out": "mlp.down",
}
_MODEL: Names = {"wte": "embed", "ln_f": "final_norm", "lm_head": "lm_head"}


def read_gptj(keys: Keys) -> Family:
    """``gptj``."""
    found = sizes(keys, hidden="n_embd", layers="n_layer", heads="n_head", inner="n_inner", inner_default=None)
    positions = keys.count("n_positions", 2048)
    keys.only("n_ctx", positions, why="it contradicts n_positions")
    keys.only("rotary", True, why="not known for gptj")
    keys.only("scale_attn_weights", True, why="not known for gptj")
    keys.skip("rope_parameters", "rope_theta")  # its base is fixed, whatever a file says
    head_dim = found["hidden_size"] // found["num_attention_heads"]
    share = (keys.count("rotary_dim", 64) + 0.5) / head_dim  # as many whole channels, however it is rounded
    rotary = rotary_set(None, head_dim, positions, theta=10000.0, partial=share)
    config = {
        **found,
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "activation": activation(keys, "activation_function", "gelu_new"),
        "parallel_residual": True,
        "rope_layout": "interleaved",
        "tie_word_embeddings": False,
    }
    return Family(
        config=config,
        positions=positions,
        layers=((None, rotary),) * found["num_hidden_layers"],
        names=table("h.{i}.", _LAYER, _MODEL),
        prefixes=("transformer.", ""),
        biased=NORMS | MLP | {"lm_head"},
    )
