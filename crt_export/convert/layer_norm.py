"""The names of Llama with layer norms: StableLM, Starcoder 2, Nemotron, Phi 1 and 2."""

from __future__ import annotations

from dataclasses import replace

from crt_export.convert.family import ATTENTION, MLP, NORMS, QKV, Family, Folds, Names, table
from crt_export.convert.keys import Keys
from crt_export.convert.llama import MODEL, PRE_NORMS, biased, common, configured, names, windowed

_QKV: Names = {"self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v"}


def read_stablelm(keys: Keys) -> Family:
    """``stablelm``: StableLM 2; the one of 12 B has one norm for both branches, and a gain of its own for each head."""
    family = configured(
        common(keys, eps=("layer_norm_eps", 1e-5), kv_heads=32, positions=4096, partial=0.25, head_dim=0), norm="layer"
    )
    linears = frozenset(QKV) if keys.flag("use_qkv_bias", False) else frozenset()
    family = replace(family, biased=NORMS | linears)
    norms = PRE_NORMS
    if keys.flag("use_parallel_residual", False):
        norms = {"input_layernorm": ("attn_norm", "mlp_norm")}
        family = configured(family, parallel_residual=True)
    if not keys.flag("qk_layernorm", False):
        return replace(family, names=names(norms))
    per_head: Names = {"self_attn.q_layernorm.norms": "attn.q_norm", "self_attn.k_layernorm.norms": "attn.k_norm"}
    return replace(
        configured(family, qk_norm="head"),
        names=names(norms, per_head),
        per_head=frozenset(("attn.q_norm", "attn.k_norm")),
    )


def read_starcoder2(keys: Keys) -> Family:
    """``starcoder2``: an MLP without gate."""
    family = common(
        keys, eps=("norm_epsilon", 1e-5), act=("hidden_act", "gelu_pytorch_tanh"), kv_heads=2, positions=4096, tied=True
    )
    linears = ATTENTION | MLP if keys.flag("use_bias", True) else frozenset()
    keys.only("scale_attn_weights", True, why="not known for starcoder2")
    keys.skip(
        "activation_function", "layer_norm_epsilon", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"
    )
    keys.only("norm_type", "layer_norm", why="not known for starcoder2")
    keys.only("mlp_type", "default", why="not known for starcoder2")
    layer: Names = {**_QKV, "self_attn.o_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down", **PRE_NORMS}
    family = replace(
        configured(family, norm="layer", gated_mlp=False),
        names=table("layers.{i}.", layer, MODEL),
        biased=NORMS | linears,
    )
    return windowed(family, keys.window("sliding_window", None))


def read_nemotron(keys: Keys) -> Family:
    """``nemotron``: Nemotron-3/4 and Minitron; squared ReLU, and norms that store ``gain - 1``."""
    family = common(keys, eps=("norm_eps", 1e-5), act=("hidden_act", "relu2"), positions=4096, partial=0.5)
    family = biased(keys, configured(replace(family, biased=NORMS), norm="layer", gated_mlp=False))
    layer: Names = {
        **_QKV,
        "self_attn.o_proj": "attn.o",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
        **PRE_NORMS,
    }
    return replace(family, names=table("layers.{i}.", layer, MODEL), folds=Folds(gain=1.0))


def read_phi(keys: Keys) -> Family:
    """``phi``: Phi 1, 1.5 and 2; one norm for both branches, biases everywhere."""
    keys.only("qk_layernorm", False, why="norms of queries and keys are not converted for phi")
    family = common(keys, eps=("layer_norm_eps", 1e-5), act=("hidden_act", "gelu_new"), partial=0.5, head_dim=0)
    layer: Names = {
        **_QKV,
        "self_attn.dense": "attn.o",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
        "input_layernorm": ("attn_norm", "mlp_norm"),
    }
    model: Names = {"embed_tokens": "embed", "final_layernorm": "final_norm", "lm_head": "lm_head"}
    return replace(
        configured(family, norm="layer", gated_mlp=False, parallel_residual=True),
        names=table("layers.{i}.", layer, model),
        biased=NORMS | ATTENTION | MLP | {"lm_head"},
    )
