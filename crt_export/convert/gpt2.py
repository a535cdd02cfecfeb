"""``transformer.h.{i}.attn.c_attn``: GPT-2 and GPT-BigCode, whose equal names mean transposed tensors."""

from __future__ import annotations

from dataclasses import replace

from crt_export.convert.family import ATTENTION, MLP, NORMS, QKV, Family, Folds, Fused, Names, activation, sizes, table
from crt_export.convert.keys import Keys

_MODEL: Names = {"wte": "embed", "wpe": "positions", "ln_f": "final_norm", "lm_head": "lm_head"}


def read_gpt2(keys: Keys) -> Family:
    """``gpt2``: linears are stored as [in, out]."""
    family = _family(keys, "gelu_new", Fused(parts=QKV))
    scale = _unscaled(keys, family)
    count = len(family.layers)
    inverse = keys.flag("scale_attn_by_inverse_layer_idx", False)
    keys.skip("reorder_and_upcast_attn")
    query = tuple(scale / (layer + 1 if inverse else 1) for layer in range(count))
    return replace(family, folds=Folds(transposed=True, query=query))


def read_gpt_bigcode(keys: Keys) -> Family:
    """``gpt_bigcode``: one key and one value for all queries, or as many as queries, then by heads."""
    single = keys.flag("multi_query", True)
    family = _family(keys, "gelu_pytorch_tanh", Fused(parts=QKV, grouped=not single))
    keys.skip(
        "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner", "pre_allocate_kv_cache"
    )
    keys.skip("validate_runner_input", "pad_key_length", "max_batch_size", "max_sequence_length")
    keys.only(
        "num_key_value_heads", 1 if single else family.config["num_attention_heads"], why="multi_query decides it"
    )
    heads = 1 if single else family.config["num_attention_heads"]
    family = replace(family, config={**family.config, "num_key_value_heads": heads})
    return replace(family, folds=Folds(query=(_unscaled(keys, family),) * len(family.layers)))


def _unscaled(keys: Keys, family: Family) -> float:
    """What undoes the scale of scores where they have none."""
    head_dim = family.config["hidden_size"] // family.config["num_attention_heads"]
    return 1.0 if keys.flag("scale_attn_weights", True) else float(head_dim) ** 0.5


def _family(keys: Keys, act: str, fused: Fused) -> Family:
    found = sizes(keys, hidden="n_embd", layers="n_layer", heads="n_head", inner="n_inner", inner_default=None)
    positions = keys.count("n_positions", 1024)
    keys.only("n_ctx", positions, why="it contradicts n_positions")
    layer: Names = {
        "ln_1": "attn_norm",
        "attn.c_attn": fused,
        "attn.c_proj": "attn.o",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }
    config = {
        **found,
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "activation": activation(keys, "activation_function", act),
        "learned_positions": True,
        "tie_word_embeddings": True,
    }
    return Family(
        config=config,
        positions=positions,
        layers=((None, None),) * found["num_hidden_layers"],
        names=table("h.{i}.", layer, _MODEL),
        prefixes=("transformer.", ""),
        biased=NORMS | ATTENTION | MLP,
    )
