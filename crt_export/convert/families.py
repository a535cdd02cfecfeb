"""Every family by its ``model_type``, and why others are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from crt_export.convert.cohere import read_cohere, read_cohere2
from crt_export.convert.falcon import read_falcon
from crt_export.convert.family import Family
from crt_export.convert.gemma import read_gemma, read_gemma3
from crt_export.convert.gpt2 import read_gpt2, read_gpt_bigcode
from crt_export.convert.gpt_neo import read_gpt_neo
from crt_export.convert.gpt_neox import read_gpt_neox
from crt_export.convert.gptj import read_gptj
from crt_export.convert.keys import Keys
from crt_export.convert.layer_norm import read_nemotron, read_phi, read_stablelm, read_starcoder2
from crt_export.convert.llama import (
    read_granite,
    read_llama,
    read_mistral,
    read_phi3,
    read_qwen2,
    read_qwen3,
    read_smollm3,
)
from crt_export.convert.olmo import read_olmo, read_olmo2, read_olmo3
from crt_export.convert.opt import read_opt
from crt_export.errors import CheckpointError, UnsupportedError

FAMILIES: Mapping[str, Callable[[Keys], Family]] = {
    "cohere": read_cohere,
    "cohere2": read_cohere2,
    "falcon": read_falcon,
    "gemma": read_gemma,
    "gemma3_text": read_gemma3,
    "gpt2": read_gpt2,
    "gpt_bigcode": read_gpt_bigcode,
    "gpt_neo": read_gpt_neo,
    "gpt_neox": read_gpt_neox,
    "gptj": read_gptj,
    "granite": read_granite,
    "llama": read_llama,
    "mistral": read_mistral,
    "nemotron": read_nemotron,
    "olmo": read_olmo,
    "olmo2": read_olmo2,
    "olmo3": read_olmo3,
    "opt": read_opt,
    "phi": read_phi,
    "phi3": read_phi3,
    "qwen2": read_qwen2,
    "qwen3": read_qwen3,
    "smollm3": read_smollm3,
    "stablelm": read_stablelm,
    "starcoder2": read_starcoder2,
}
_ALIBI = "alibi, a bias of scores by distance, has no equal here"
_AFTER = "its norms come after the sum"
_EXPERTS = "mixtures of experts have no equal here"
_LATENT = "keys and values from a latent vector (MLA) have no equal here"
_STATE = "state-space layers have no equal here"
_WRAPPER = (
    "it is more than a language model; save its language model alone: text_config as config.json, and the tensors "
    "under language_model. without that prefix"
)
_OWN_FORMAT = "this is a checkpoint of this package already"
#: Why a known ``model_type`` is refused.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("context_ready_transformer", "transformer"), _OWN_FORMAT),
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(("roformer", "bert", "roberta", "openai-gpt", "xlnet", "biogpt", "xglm"), _AFTER),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "dbrx", "jetmoe", "llama4_text"),
        _EXPERTS,
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3"), _LATENT),
    **dict.fromkeys(
        (
            "mamba",
            "mamba2",
            "falcon_mamba",
            "jamba",
            "bamba",
            "zamba",
            "zamba2",
            "rwkv",
            "recurrent_gemma",
            "granitemoehybrid",
            "qwen3_next",
            "falcon_h1",
            "lfm2",
            "nemotron_h",
        ),
        _STATE,
    ),
    **dict.fromkeys(
        (
            "gemma3",
            "llava",
            "mllama",
            "mistral3",
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen3_vl",
            "paligemma",
            "llama4",
            "idefics3",
            "smolvlm",
        ),
        _WRAPPER,
    ),
    "gemma2": "no fused kernel caps scores (attn_logit_softcapping); Gemma 3 does without",
    "gpt_oss": "attention sinks have no equal here",
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), "inputs of each layer have no equal here"),
    **dict.fromkeys(("t5", "bart", "mbart", "whisper", "pegasus"), "encoder-decoders have no equal here"),
}


def read_family(keys: Keys) -> tuple[str, Family]:
    """``model_type`` and what its family's file makes of the keys.

    Raises:
        CheckpointError: A key is missing or of the wrong type.
        UnsupportedError: The family, or something of it, is not converted.
    """
    kind = keys.value("model_type")
    if not isinstance(kind, str):
        raise CheckpointError("config.json: missing key 'model_type', the name of an architecture of transformers")
    if kind not in FAMILIES:
        reason = REFUSED.get(kind, "this version does not know it")
        raise UnsupportedError(
            f"model_type {kind!r:.60} is not converted: {reason} (converted are {', '.join(FAMILIES)})"
        )
    return kind, FAMILIES[kind](keys)
