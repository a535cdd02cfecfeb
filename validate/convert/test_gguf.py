"""GGUF files, written here as llama.cpp writes them: rows of queries and keys reordered, Gemma's gains shifted by 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crt_export.checkpoint import load_checkpoint
from crt_export.convert import convert
from crt_export.errors import CheckpointError, UnsupportedError
from crt_export.models.registry import model_from_checkpoint

gguf = pytest.importorskip("gguf")
Theirs = Callable[[str], tuple[Path, torch.Tensor]]
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA3 = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """As convert_hf_to_gguf.py stores queries and keys of Llama."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _write(
    file: Path, folder: Path, kind: str, quantised: str = "", factors: np.ndarray | None = None, **extra: Any
) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0 if kind != "gemma3" else 1000000.0)
    writer.add_key_length(config["head_dim"])
    if kind == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    for name, value in extra.items():
        writer.add_uint32(f"{kind}.{name}", value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    names = {**_NAMES, **(_GEMMA3 if kind == "gemma3" else {})}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, suffix = name.rpartition(".")
        layer = stem.split(".")[2] if stem.startswith("model.layers.") else None
        module = stem if layer is None else stem.split(".", 3)[3]
        values = tensor.numpy() + 1 if kind != "llama" and "norm" in stem else tensor.numpy()
        if kind == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config["num_attention_heads" if ".q_" in name else "num_key_value_heads"]
            values = _permuted(values, heads)
        full = names[module] if layer is None else f"blk.{layer}.{names[module]}"
        if quantised and values.ndim == 2:
            kind_ = gguf.GGMLQuantizationType[quantised]
            writer.add_tensor(f"{full}.{suffix}", gguf.quantize(values, kind_), raw_dtype=kind_)
        else:
            writer.add_tensor(f"{full}.{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _logits(folder: Path, token_ids: torch.Tensor) -> torch.Tensor:
    model = model_from_checkpoint(load_checkpoint(folder))
    with torch.no_grad():
        return model.head(model.unroll(token_ids, 1)[0].hidden)


@pytest.mark.parametrize(("variant", "kind"), [("llama", "llama"), ("gemma", "gemma"), ("gemma3_text plain", "gemma3")])
def test_a_gguf_file_equals_the_folder_it_was_made_from(
    variant: str, kind: str, theirs: Theirs, tmp_path: Path, token_ids: torch.Tensor, gate: float
) -> None:
    folder, expected = theirs(variant)
    _write(tmp_path / "model.gguf", folder, kind)
    convert(tmp_path / "model.gguf", tmp_path / "out", plain=True)
    assert float((_logits(tmp_path / "out", token_ids) - expected).abs().max()) <= gate


@pytest.mark.parametrize("quantised", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_quantised_weights_are_what_the_quantisation_left(quantised: str, theirs: Theirs, tmp_path: Path) -> None:
    folder, _ = theirs("llama wide")
    _write(tmp_path / "model.gguf", folder, "llama", quantised)
    made = convert(tmp_path / "model.gguf", tmp_path / "out", plain=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    half = {"BF16": torch.bfloat16, "F16": torch.float16}.get(quantised, torch.float32)
    assert stored["layers.0.attn.q.weight"].dtype == half
    right = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    kind = gguf.GGMLQuantizationType[quantised]
    left = torch.from_numpy(gguf.dequantize(gguf.quantize(right.numpy(), kind), kind).copy())
    assert torch.equal(stored["layers.0.attn.q.weight"].float(), left)
    assert made.family == "llama"


def test_other_families_are_refused(theirs: Theirs, tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", theirs("llama")[0], "mamba")
    with pytest.raises(UnsupportedError, match="architecture 'mamba'; converted are llama, gemma, gemma3"):
        convert(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_that_are_not_known_are_refused(theirs: Theirs, tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", theirs("llama")[0], "llama", expert_count=4)
    with pytest.raises(UnsupportedError, match=r"llama\.expert_count = 4 is not known"):
        convert(tmp_path / "model.gguf", tmp_path / "out")


@pytest.mark.parametrize("kept", [2, 30, -100])
def test_a_truncated_file(kept: int, theirs: Theirs, tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", theirs("llama")[0], "llama")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match="GGUF file, found"):
        convert(tmp_path / "model.gguf", tmp_path / "out")


def _factors(by: float) -> np.ndarray:
    """As convert_hf_to_gguf.py computes them for Llama 3.1 and later."""
    factors = []
    for frequency in 1.0 / 10000.0 ** (np.arange(0, 8, 2, dtype=np.float32) / 8):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / by + smooth)
        factors.append(1.0 if wavelength < 8192 / 4 else by if wavelength > 8192 else between)
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("by", [8.0, 32.0])
def test_scaled_frequencies_are_told_by_their_factors(
    by: float, theirs: Theirs, tmp_path: Path, token_ids: torch.Tensor, gate: float
) -> None:
    folder, expected = theirs(f"llama 3.{1 if by == 8 else 2}")
    _write(tmp_path / "model.gguf", folder, "llama", factors=_factors(by))
    convert(tmp_path / "model.gguf", tmp_path / "out", plain=True)
    assert float((_logits(tmp_path / "out", token_ids) - expected).abs().max()) <= gate


def test_other_factors_are_refused(theirs: Theirs, tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", theirs("llama 3.1")[0], "llama", factors=_factors(8.0) * np.float32(1.01))
    with pytest.raises(UnsupportedError, match="scales the frequencies as no Llama does"):
        convert(tmp_path / "model.gguf", tmp_path / "out")


@pytest.mark.parametrize(("before", "after"), [(b"llama.block_count", b"llama.block_cOunt"), (b"llama.", b"LLama.")])
def test_metadata_that_is_missing(before: bytes, after: bytes, theirs: Theirs, tmp_path: Path) -> None:
    _write(tmp_path / "model.gguf", theirs("llama")[0], "llama")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(before, after))
    with pytest.raises((CheckpointError, UnsupportedError), match=r"block_c|damaged"):
        convert(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
