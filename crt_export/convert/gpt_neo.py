"""GPT-Neo: scores that are not scaled, and every other layer local."""

from __future__ import annotations

from typing import Any

from crt_export.convert.family import MLP, NORMS, Family, Folds, Names, activation, sizes, table
from crt_export.convert.keys import Keys
from crt_export.errors import CheckpointError

_LAYER: Names = {
    "ln_1": "attn_norm",
    "attn.attention.q_proj": "attn.q",
    "attn.attention.k_proj": "attn.k",
    "attn.attention.v_proj": "attn.v",
    "attn.attention.out_proj": "attn.o",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
_MODEL: Names = {"wte": "embed", "wpe": "positions", "ln_f": "final_norm", "lm_head": "lm_head"}


def read_gpt_neo(keys: Keys) -> Family:
    """``gpt_neo``."""
    found = sizes(keys, layers="num_layers", heads="num_heads", inner_default=None)
    count, window = found["num_hidden_layers"], keys.window("window_size", 256)
    kinds = _kinds(keys.value("attention_types", [[["global", "local"], 12]]), count)
    keys.only("attention_layers", kinds, why="it contradicts attention_types")
    config = {
        **found,
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "activation": activation(keys, "activation_function", "gelu_new"),
        "learned_positions": True,
        "tie_word_embeddings": True,
    }
    head_dim = found["hidden_size"] // found["num_attention_heads"]
    return Family(
        config=config,
        positions=keys.count("max_position_embeddings", 2048),
        layers=tuple((window if kind == "local" else None, None) for kind in kinds),
        names=table("h.{i}.", _LAYER, _MODEL),
        prefixes=("transformer.", ""),
        biased=NORMS | MLP | {"attn.o"},
        folds=Folds(query=(float(head_dim) ** 0.5,) * count),
    )


def _kinds(types: Any, count: int) -> list[str]:
    """The kind of each layer, from pairs of kinds and how often they are repeated."""
    try:
        kinds = [kind for names, times in types for kind in list(names) * min(times, count)]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != count or not set(kinds) <= {"global", "local"}:
        raise CheckpointError(
            f"config.json: attention_types must give global or local to each of {count} layers, found {types!r:.80}"
        )
    return kinds
