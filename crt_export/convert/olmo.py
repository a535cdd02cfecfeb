"""OLMo: the first without parameters in its norms, the others with norms behind the branches."""

from __future__ import annotations

from dataclasses import replace

from crt_export.convert.family import NORMS, Family, Names, kinds_by_interval
from crt_export.convert.keys import Keys
from crt_export.convert.llama import QK_NORMS, biased, common, configured, names
from crt_export.convert.rotary import FULL, SLIDING, read_rotary_by_layer

_POST: Names = {"post_attention_layernorm": "attn_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}


def read_olmo(keys: Keys) -> Family:
    """``olmo``: layer norms without gain and bias, their epsilon fixed."""
    keys.only("clip_qkv", None, why="queries, keys and values that are clipped are not converted")
    family = biased(keys, common(keys, eps=("layer_norm_eps", 1e-5), head_dim=0), mlp=False)
    keys.only("layer_norm_eps", 1e-5, why="olmo has 1e-5")
    bare: Names = {}
    model = {theirs: ours for theirs, ours in names(bare).items() if ours != "final_norm"}
    return replace(configured(family, norm="layer"), names=model, bare=NORMS)


def read_olmo2(keys: Keys) -> Family:
    """``olmo2``: a norm of all queries and of all keys."""
    return _post(biased(keys, common(keys, eps=("rms_norm_eps", 1e-5), head_dim=0), mlp=False))


def read_olmo3(keys: Keys) -> Family:
    """``olmo3``: as the second; three of four layers slide, and yarn is for the others."""
    family = common(keys, rotary=False, eps=("rms_norm_eps", 1e-5), head_dim=0)
    count, head_dim = int(family.config["num_hidden_layers"]), int(family.config["head_dim"])
    kinds = keys.names("layer_types", count, (FULL, SLIDING)) or kinds_by_interval(count, 4, SLIDING, FULL)
    window = keys.window("sliding_window", 4096)
    sets = read_rotary_by_layer(keys, head_dim, family.positions, theta=500000.0, local_key=None, local_theta=500000.0)
    layers = tuple((window if kind == SLIDING else None, sets[kind]) for kind in kinds)
    return _post(biased(keys, replace(family, layers=layers), mlp=False))


def _post(family: Family) -> Family:
    return replace(configured(family, qk_norm="full", norm_placement="post"), names=names(_POST, QK_NORMS))
