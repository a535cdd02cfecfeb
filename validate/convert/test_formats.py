"""What lies on disks: both forms of config.json, shards, half precision, old names, heads tied or only said so."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crt_export.checkpoint import load_checkpoint
from crt_export.convert import convert, fold
from crt_export.convert.plan import Plan
from crt_export.errors import UnsupportedError
from crt_export.models.registry import model_from_checkpoint

Theirs = Callable[[str], tuple[Path, torch.Tensor]]
Logits = Callable[[Plan, Path], torch.Tensor]
Edit = Callable[..., None]
PlanOf = Callable[[Path], Plan]

#: By variant: the keys that transformers 4 wrote where transformers 5 writes rope_parameters.
VERSION_4: Mapping[str, dict[str, Any]] = {
    "llama linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama llama3": {
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama yarn": {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "mistral": {"rope_theta": 10000.0, "rope_scaling": None},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25, "rope_scaling": None},
    "phi": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
    "stablelm": {"rope_theta": 10000, "partial_rotary_factor": 0.25},
    "nemotron": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "gemma3_text": {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
        "layer_types": None,
    },
    "olmo3": {
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        "layer_types": None,
    },
    "cohere2": {"rope_theta": 10000.0, "sliding_window_pattern": 4, "layer_types": None},
    "smollm3": {"rope_theta": 2000000.0, "no_rope_layers": [1, 1, 1, 0], "rope_scaling": None},
    "qwen2 windows": {"rope_theta": 10000.0, "layer_types": None},
}


@pytest.fixture
def copied(theirs: Theirs, tmp_path: Path) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """A copy of a variant that a test may change."""

    def copy(name: str) -> tuple[Path, torch.Tensor]:
        folder, logits = theirs(name)
        return Path(shutil.copytree(folder, tmp_path / "source")), logits

    return copy


def _theirs_of(folder: Path, token_ids: torch.Tensor, **values: Any) -> torch.Tensor:
    """What transformers itself makes of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **values)
        with torch.no_grad():
            return model.eval()(token_ids).logits


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("variant", VERSION_4)
def test_the_keys_of_transformers_4_mean_the_same(
    variant: str,
    copied: Theirs,
    plan_of: PlanOf,
    plan_logits: Logits,
    gate: float,
    edit_config: Edit,
    token_ids: torch.Tensor,
) -> None:
    folder, expected = copied(variant)
    edit_config(folder, rope_parameters=None, dtype=None, torch_dtype="float32", **VERSION_4[variant])
    assert _largest(_theirs_of(folder, token_ids), expected) == 0
    assert _largest(plan_logits(plan_of(folder), folder), expected) <= gate


@pytest.mark.parametrize(
    ("variant", "absent"),
    [
        ("gemma", ["tie_word_embeddings", "hidden_act", "rms_norm_eps", "rope_parameters"]),
        ("gpt_neox", ["rope_parameters", "hidden_act", "use_parallel_residual", "tie_word_embeddings"]),
        ("falcon 7b", ["multi_query", "parallel_attn", "ffn_hidden_size", "rope_parameters", "alibi", "bias"]),
        ("gpt2", ["n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings"]),
        ("smollm3", ["no_rope_layers", "rope_parameters", "tie_word_embeddings", "layer_types"]),
        ("phi", ["rope_parameters", "hidden_act", "layer_norm_eps"]),
        ("nemotron", ["rope_parameters", "hidden_act", "norm_eps"]),
        ("cohere", ["logit_scale", "rope_parameters", "tie_word_embeddings"]),
        ("opt", ["word_embed_proj_dim", "activation_function", "do_layer_norm_before"]),
        ("starcoder2", ["hidden_act", "norm_epsilon", "use_bias", "tie_word_embeddings"]),
        ("olmo3", ["layer_types", "rms_norm_eps"]),
        ("gemma3_text", ["layer_types", "hidden_activation", "tie_word_embeddings"]),
    ],
)
def test_keys_that_are_absent_have_the_defaults_of_their_family(
    variant: str,
    absent: list[str],
    copied: Theirs,
    plan_of: PlanOf,
    plan_logits: Logits,
    gate: float,
    edit_config: Edit,
) -> None:
    folder, expected = copied(variant)
    edit_config(folder, **dict.fromkeys(absent))
    assert _largest(plan_logits(plan_of(folder), folder), expected) <= gate


def test_shards_are_read_by_their_index(
    theirs: Theirs, tmp_path: Path, plan_of: PlanOf, plan_logits: Logits, gate: float
) -> None:
    folder, expected = theirs("gemma3_text")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    split = tmp_path / "split"
    split.mkdir()
    shutil.copyfile(folder / "config.json", split / "config.json")
    index: dict[str, str] = {}
    for number in range(4):
        file = f"model-0000{number + 1}-of-00004.safetensors"
        save_file({name: tensors[name] for name in names[number::4]}, split / file)
        index |= dict.fromkeys(names[number::4], file)
    (split / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert _largest(plan_logits(plan_of(split), split), expected) <= gate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["gemma3_text", "llama yarn", "gpt2", "granite"])
def test_half_precision_equals_transformers_in_float32(
    variant: str, dtype: torch.dtype, copied: Theirs, gate: float, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    folder, _ = copied(variant)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    made = convert(folder, tmp_path / "out", plain=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float32} == set(made.folded)
    assert {tensor.dtype for name, tensor in stored.items() if name not in made.folded} == {dtype}
    model = model_from_checkpoint(load_checkpoint(tmp_path / "out"))
    expected = _theirs_of(folder, token_ids, dtype=torch.float32)
    if variant == "gemma3_text" and dtype == torch.bfloat16:
        assert "embed.weight" in made.folded  # sqrt(hidden_size) in float32, not rounded to the weights' dtype
    with torch.no_grad():
        assert _largest(model.head(model.unroll(token_ids, 1)[0].hidden), expected) <= gate


@pytest.mark.parametrize("variant", ["gemma3_text", "gpt2", "phi", "stablelm 12b", "llama yarn", "falcon 40b", "opt"])
def test_blocks_of_a_tensor_are_all_of_it(
    variant: str, theirs: Theirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = theirs(variant)
    convert(folder, tmp_path / "whole")
    monkeypatch.setattr(fold, "_BLOCK", 100)  # a few rows
    convert(folder, tmp_path / "blocks")
    assert load_checkpoint(tmp_path / "blocks").sha256 == load_checkpoint(tmp_path / "whole").sha256


def test_names_without_prefix_and_masks_that_are_no_weights(
    copied: Theirs, plan_of: PlanOf, plan_logits: Logits, gate: float
) -> None:
    folder, expected = copied("gpt2")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, folder / "model.safetensors")
    assert _largest(plan_logits(plan_of(folder), folder), expected) <= gate


def test_the_head_of_gpt_neox_under_its_other_name(
    copied: Theirs, plan_of: PlanOf, plan_logits: Logits, gate: float
) -> None:
    folder, expected = copied("gpt_neox")
    tensors = load_file(folder / "model.safetensors")
    head = "lm_head.weight" if "lm_head.weight" in tensors else "embed_out.weight"
    other = {"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"}[head]
    tensors[other] = tensors.pop(head)
    save_file(tensors, folder / "model.safetensors")
    assert _largest(plan_logits(plan_of(folder), folder), expected) <= gate


def test_a_tied_head_that_is_stored_is_one_tensor(
    copied: Theirs, plan_of: PlanOf, plan_logits: Logits, gate: float
) -> None:
    folder, expected = copied("llama tied biased")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    made = plan_of(folder)
    assert made.config.tie_word_embeddings
    assert _largest(plan_logits(made, folder), expected) <= gate


@pytest.mark.parametrize("variant", ["llama tied biased", "gemma"])
def test_a_tied_head_that_differs_is_not_tied(
    variant: str, copied: Theirs, plan_of: PlanOf, plan_logits: Logits, gate: float, token_ids: torch.Tensor
) -> None:
    folder, tied = copied(variant)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + torch.linspace(-0.3, 0.3, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    made = plan_of(folder)
    assert not made.config.tie_word_embeddings
    expected = _theirs_of(folder, token_ids)
    assert _largest(expected, tied) > 0.1
    assert _largest(plan_logits(made, folder), expected) <= gate


def test_a_tied_head_with_a_bias_of_its_own(
    copied: Theirs, plan_of: PlanOf, plan_logits: Logits, gate: float, edit_config: Edit, token_ids: torch.Tensor
) -> None:
    folder, _ = copied("gptj")
    edit_config(folder, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert _largest(plan_logits(plan_of(folder), folder), _theirs_of(folder, token_ids)) <= gate


def test_fewer_positions_compute_the_same(theirs: Theirs, tmp_path: Path, token_ids: torch.Tensor, gate: float) -> None:
    folder, expected = theirs("opt")
    made = convert(folder, tmp_path / "out", plain=True, max_positions=20)
    assert made.config.max_position_embeddings == 20
    model = model_from_checkpoint(load_checkpoint(tmp_path / "out"))
    with torch.no_grad():
        logits = model.head(model.unroll(token_ids[:, :20], 1)[0].hidden)
    assert _largest(logits, expected[:, :20]) <= gate
    assert convert(folder, tmp_path / "out", plain=True, max_positions=500).config.max_position_embeddings == 64


#: Keys that configurations of known models have besides those that transformers 5 writes.
ON_THE_HUB: Mapping[str, dict[str, Any]] = {
    "llama": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "pretraining_tp": 2,
        "transformers.js_config": {"dtype": "q4"},
        "rope_scaling": None,
        "unsloth_fixed": True,
    },
    "gpt2": {"n_ctx": 128, "_num_labels": 1, "summary_type": "cls_index", "task_specific_params": {"text": {}}},
    "gpt_neo": {"gradient_checkpointing": False, "summary_use_proj": True, "attention_layers": ["global", "local"] * 2},
    "gptj": {"rotary": True, "scale_attn_weights": True, "gradient_checkpointing": False, "tokenizer_class": "GPT2"},
    "opt": {"activation_dropout": 0.0, "prefix": "</s>", "_remove_final_layer_norm": False},
    "falcon 7b": {"apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.1},
    "gemma": {"hidden_activation": None, "hidden_act": "gelu"},
    "gemma3_text": {"cache_implementation": "hybrid", "_sliding_window_pattern": 6, "attn_logit_softcapping": None},
    "smollm3": {"max_window_layers": 28, "use_sliding_window": False, "pretraining_tp": 2},
    "qwen2": {"use_mrope": False, "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 0},
    "starcoder2": {
        "activation_function": "gelu",
        "attention_softmax_in_fp32": True,
        "layer_norm_epsilon": 1e-5,
        "mlp_type": "default",
        "norm_type": "layer_norm",
        "scale_attn_weights": True,
    },
    "cohere": {"model_max_length": 131072, "use_qk_norm": False},
    "cohere2": {
        "layer_switch": 4,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": False,
    },
    "gpt_bigcode": {
        "inference_runner": 0,
        "max_batch_size": None,
        "pad_key_length": True,
        "validate_runner_input": True,
    },
}


@pytest.mark.parametrize("variant", ON_THE_HUB)
def test_keys_of_files_on_the_hub_are_known(
    variant: str, copied: Theirs, plan_of: PlanOf, plan_logits: Logits, gate: float, edit_config: Edit
) -> None:
    folder, expected = copied(variant)
    edit_config(folder, **ON_THE_HUB[variant])
    assert _largest(plan_logits(plan_of(folder), folder), expected) <= gate


@pytest.mark.parametrize(
    ("variant", "values", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope.*change with the length"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic.*change with the length"),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "'spiral': not known"),
        ("llama", {"rope_parameters": {"rope_type": {"a": 1}}}, "rope_type"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "shift": 1}}, "unknown shift"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        ("llama", {"clip_everything": 3}, "clip_everything = 3: this version does not know"),
        ("llama", {"new_flag": False}, "new_flag = False"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "Phi-3-mini-4k"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "Phi-3-mini-4k"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "turns all channels"),
        ("olmo2", {"partial_rotary_factor": 0.5}, "turns all channels"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "all channels"),
        ("stablelm", {"head_dim": 4}, "head_dim = 4: it contradicts"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm = True"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("falcon 7b", {"alibi": True}, "alibi"),
        ("opt", {"do_layer_norm_before": False}, "norms after the sum"),
        ("opt", {"word_embed_proj_dim": 16}, "projected embeddings"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "later ones"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "scores that are capped"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
    ],
)
def test_what_a_known_family_may_ask_for_and_is_refused(
    variant: str, values: dict[str, Any], message: str, copied: Theirs, plan_of: PlanOf, edit_config: Edit
) -> None:
    folder, _ = copied(variant)
    edit_config(folder, **values)
    with pytest.raises(UnsupportedError, match=message):
        plan_of(folder)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bloom", "alibi"),
        ("mpt", "alibi"),
        ("roformer", "after the sum"),
        ("openai-gpt", "after the sum"),
        ("mixtral", "mixtures of experts"),
        ("deepseek_v3", "MLA"),
        ("mamba", "state-space"),
        ("qwen3_next", "state-space"),
        ("gpt_oss", "sinks"),
        ("gemma2", "caps scores"),
        ("gemma3", "text_config"),
        ("gemma3n", "inputs of each layer"),
        ("transformer", "checkpoint of this package"),
        ("t5", "encoder-decoders"),
        ("never_heard_of", "does not know it"),
    ],
)
def test_other_families_are_refused_by_name_and_reason(kind: str, reason: str, tmp_path: Path, plan_of: PlanOf) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedError, match=f"model_type '{kind}' is not converted: .*{reason}"):
        plan_of(tmp_path)
