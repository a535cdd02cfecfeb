"""Tiny random models of transformers, every parameter disturbed, as they lie on the disk.

Only what may be imported without transformers is imported here: the tests of hostile folders need none of it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from crt_export.checkpoint import Checkpoint
from crt_export.convert.folder import HuggingFaceFolder
from crt_export.convert.plan import Plan, plan_conversion, tensors_of
from crt_export.models.registry import model_from_checkpoint

_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 64}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
#: By name: class of the configuration and its values. Sequences of 60 go beyond every window of 8.
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT),
    "gpt2 1/(i+1)": ("GPT2", {**_GPT, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2 not scaled": ("GPT2", {**_GPT, "scale_attn_weights": False}),
    "gpt_neo": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "vocab_size": 97,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 8,
        },
    ),
    "gpt_bigcode": ("GPTBigCode", _GPT),
    "gpt_bigcode heads": ("GPTBigCode", {**_GPT, "multi_query": False}),
    "gpt_neox": ("GPTNeoX", {**_SIZES, "intermediate_size": 48}),
    "gpt_neox sequential": (
        "GPTNeoX",
        {
            **_SIZES,
            "intermediate_size": 48,
            "use_parallel_residual": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 4}),
    "phi": ("Phi", {**_SIZES, "intermediate_size": 48}),
    "phi grouped": ("Phi", _GROUPED),
    "phi3": ("Phi3", {**_GROUPED, "sliding_window": 8, "pad_token_id": 0}),
    "opt": ("OPT", {**_SIZES, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "falcon 7b": ("Falcon", _SIZES),
    "falcon 40b": ("Falcon", {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b": (
        "Falcon",
        {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon biased": ("Falcon", {**_SIZES, "parallel_attn": False, "multi_query": False, "bias": True}),
    "llama": ("Llama", _GROUPED),
    "llama tied biased": (
        "Llama",
        {**_GROUPED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama linear": (
        "Llama",
        {**_GROUPED, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama llama3": ("Llama", {**_GROUPED, "rope_parameters": _LLAMA3}),
    "llama yarn": ("Llama", {**_GROUPED, "rope_parameters": _YARN}),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 8, "head_dim": 16}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen2 windows": (
        "Qwen2",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3 tied biased": ("Qwen3", {**_GROUPED, "tie_word_embeddings": True, "attention_bias": True, "head_dim": 8}),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 16}),
    "smollm3": ("SmolLM3", {**_GROUPED, "num_hidden_layers": 4, "pad_token_id": 0}),
    "granite": (
        "Granite",
        {
            **_GROUPED,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.8,
        },
    ),
    "olmo": ("Olmo", _GROUPED),
    "olmo2": ("Olmo2", _GROUPED),
    "olmo3": (
        "Olmo3",
        {
            **_GROUPED,
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
                "full_attention": {**_YARN, "rope_theta": 500000.0},
            },
        },
    ),
    "gemma": ("Gemma", {**_GROUPED, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma3_text": (
        "Gemma3Text",
        {
            **_GROUPED,
            "num_hidden_layers": 6,
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        },
    ),
    "gemma3_text capped": ("Gemma3Text", {**_GROUPED, "head_dim": 16, "final_logit_softcapping": 5.0}),
    "stablelm": ("StableLm", {**_GROUPED, "use_qkv_bias": True}),
    "stablelm norms": ("StableLm", {**_GROUPED, "qk_layernorm": True}),
    "stablelm 12b": ("StableLm", {**_GROUPED, "qk_layernorm": True, "use_parallel_residual": True}),
    "cohere": ("Cohere", _GROUPED),
    "cohere norms": ("Cohere", {**_GROUPED, "use_qk_norm": True, "logit_scale": 1.5}),
    "cohere2": ("Cohere2", {**_GROUPED, "num_hidden_layers": 4, "sliding_window": 8, "logit_scale": 0.9}),
    "starcoder2": ("Starcoder2", {**_GROUPED, "sliding_window": 8}),
    "starcoder2 bare": ("Starcoder2", {**_GROUPED, "use_bias": False, "tie_word_embeddings": False}),
    "nemotron biased": ("Nemotron", {**_GROUPED, "num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}),
    "nemotron": ("Nemotron", {**_GROUPED, "num_hidden_layers": 2, "head_dim": 8}),
}
#: For single tests: a family that is refused, and what GGUF can hold.
_OTHERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text plain": (
        "Gemma3Text",
        {**_GROUPED, "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    ),
    "llama 3.1": ("Llama", {**_GROUPED, "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 8192}}),
    "llama 3.2": (
        "Llama",
        {**_GROUPED, "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0}},
    ),
    "llama wide": ("Llama", {**_GROUPED, "intermediate_size": 64}),
    "gemma2": ("Gemma2", {**_GROUPED, "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 2.0}),
    "gemma2 uncapped": ("Gemma2", {**_GROUPED, "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": None}),
}
_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
_LENGTH = 60
#: Right conversions differ by 6e-8 to 7e-6, the smallest of the mistakes of test_faults.py by more than 1e-4.
_GATE = 1e-5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``variant`` and names none runs with every one."""
    marked = any("variant" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "variant" in metafunc.fixturenames and not marked:
        metafunc.parametrize("variant", VARIANTS)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of families and their differences."""
    reports = [*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())]
    rows = [value for report in reports for name, value in report.user_properties if name == "conversion"]
    if rows:
        terminalreporter.section("converted models: largest difference of logits from transformers")
        for row in sorted(rows):
            terminalreporter.write_line(row)


def _disturb(model: torch.nn.Module) -> None:
    """No bias stays 0 and no gain 1: half of all mistakes would be invisible."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, torch.Tensor]]:
    """A saved model of a variant and its logits of :func:`tokens`, made once."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(name: str) -> tuple[Path, torch.Tensor]:
        if name not in made:
            made[name] = _saved(name, tmp_path_factory.mktemp("theirs") / "model")
        return made[name]

    return make


def _saved(name: str, folder: Path) -> tuple[Path, torch.Tensor]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from transformers import AutoModelForCausalLM

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        kind, values = {**VARIANTS, **_OTHERS}[name]
        config = getattr(transformers, f"{kind}Config")(**{"max_position_embeddings": 128, **values})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        _disturb(model)
        with torch.no_grad():
            logits = model(_tokens()).logits
        model.save_pretrained(folder)
    return folder, logits


def _tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, _LENGTH), generator=torch.Generator().manual_seed(2))


def _logits(plan: Plan, folder: Path) -> torch.Tensor:
    tensors = {name: tensor.float() for name, tensor in tensors_of(plan, HuggingFaceFolder(folder))}
    checkpoint = Checkpoint(path=folder, config=plan.config, tensors=tensors, stored_dtypes=("F32",), sha256="")
    model = model_from_checkpoint(checkpoint)
    with torch.no_grad():
        return model.head(model.unroll(_tokens(), 1)[0].hidden)


@pytest.fixture(scope="session")
def plan_logits() -> Callable[[Plan, Path], torch.Tensor]:
    """Logits of a plan without writing it."""
    return _logits


@pytest.fixture(scope="session")
def gate() -> float:
    """Largest difference of logits that a right conversion may have."""
    return _GATE


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """2 x 60 tokens."""
    return _tokens()


@pytest.fixture(scope="session")
def variants() -> Mapping[str, tuple[str, dict[str, Any]]]:
    """Every variant by its name."""
    return VARIANTS


@pytest.fixture
def plan_of() -> Callable[[Path], Plan]:
    """The plan of a folder as a plain transformer."""
    return lambda folder: plan_conversion(HuggingFaceFolder(folder), None)


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Change keys of a folder's config.json; None removes one."""

    def edit(folder: Path, **values: Any) -> None:
        file = folder / "config.json"
        config = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return edit


def _shapes() -> dict[str, tuple[int, ...]]:
    layer = {f"self_attn.{name}_proj": (16, 16) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
    layer |= {"input_layernorm": (16,), "post_attention_layernorm": (16,)}
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    return {**shapes, "model.embed_tokens.weight": (97, 16), "model.norm.weight": (16,), "lm_head.weight": (97, 16)}


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A tiny Llama as transformers would save it, made without transformers."""
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in _shapes().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_LLAMA))
    return folder
