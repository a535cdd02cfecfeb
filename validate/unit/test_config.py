"""config.json: defaults, and every problem reported at once by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.checkpoint import tensor_shapes
from crt_export.config import ModelConfig, load_config
from crt_export.errors import CheckpointError, UnsupportedError

# architecture.md of the format, word for word
EXAMPLE = """
{"model_type": "context_ready_transformer", "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 1,
 "num_attention_heads": 4, "intermediate_size": 512, "correction_intermediate_size": 512,
 "max_position_embeddings": 1024, "layer_norm_eps": 1e-05, "rope_theta": 10000.0, "rope_layout": "interleaved",
 "unroll_steps": 10, "tie_word_embeddings": false, "tokenizer": "byte"}
"""


def _example(**changes: Any) -> dict[str, Any]:
    return json.loads(EXAMPLE) | changes


def test_optional_keys_have_the_documented_defaults() -> None:
    config: Any = ModelConfig.from_dict(_example())
    assert (config.format_version, config.head_dim, config.num_key_value_heads) == (1, 32, 4)
    assert config.sliding_window is config.bos_token_id is config.eos_token_id is None
    assert config.training_sequence_length is None
    assert config.carried.iterated


def test_plain_transformer_needs_no_correction_keys() -> None:
    values = _example(model_type="transformer")
    del values["correction_intermediate_size"], values["unroll_steps"]
    assert not ModelConfig.from_dict(values).carried.states


@pytest.mark.parametrize("key", sorted(json.loads(EXAMPLE)))
def test_each_key_of_the_example_is_required(key) -> None:
    values = _example()
    del values[key]
    with pytest.raises(CheckpointError, match=key):
        ModelConfig.from_dict(values)


def test_unknown_and_missing_keys_are_reported_together() -> None:
    values = _example(hidden=1, dropout=0.1)
    del values["rope_theta"], values["vocab_size"]
    with pytest.raises(CheckpointError, match="4 problems") as caught:
        ModelConfig.from_dict(values)
    for name in ("unknown key 'hidden'", "unknown key 'dropout'", "key 'rope_theta'", "key 'vocab_size'"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 2"),
        ({"vocab_size": 1, "tokenizer": "none"}, "vocab_size must be at least 2, found 1"),
        ({"vocab_size": "256"}, "vocab_size must be an integer, found '256'"),
        ({"vocab_size": True}, "vocab_size must be an integer, found True"),
        ({"hidden_size": 128.0}, "hidden_size must be an integer"),
        ({"hidden_size": 130}, "not a multiple of num_attention_heads"),
        ({"hidden_size": 12}, "head_dim must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be greater than 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be greater than 0"),
        ({"num_attention_heads": -4}, "num_attention_heads must be greater than 0"),
        ({"intermediate_size": -1}, "intermediate_size must be greater than 0"),
        ({"correction_intermediate_size": 0}, "correction_intermediate_size must be greater than 0"),
        ({"correction_intermediate_size": None}, "correction_intermediate_size must be an integer, found None"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be greater than 0"),
        ({"unroll_steps": 0}, "unroll_steps must be greater than 0"),
        ({"layer_norm_eps": 0}, "layer_norm_eps must be greater than 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a finite number"),
        ({"rope_theta": 10**400}, r"rope_theta must be a finite number, found 1000*\.\.\.$"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps must be a finite number"),
        ({"max_position_embeddings": 2**20 + 1}, "max_position_embeddings must be at most 1048576 in this version"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 4096 in this version, found 1000000000"),
        ({"unroll_steps": 10**9}, "unroll_steps must be at most 4096 in this version"),
        ({"rope_layout": "neox"}, "rope_layout must be one of interleaved, half"),
        ({"rope_layout": ["half"]}, "rope_layout must be one of interleaved, half"),
        ({"model_type": "gpt2"}, "model_type must be one of"),
        ({"tokenizer": "bpe"}, "tokenizer must be one of byte, tokenizer.json, none"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"head_dim": -32}, "head_dim must be greater than 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"norm": "batch"}, "norm must be one of layer, rms"),
        ({"norm_eps": 1e-5}, "layer_norm_eps and norm_eps are one key"),
        ({"activation": "swish"}, "activation must be one of gelu, gelu_tanh, relu, relu_squared, silu"),
        ({"rope_frequencies": [[1.0] * 16]}, "rope_theta and rope_frequencies exclude each other"),
        ({"rope_theta": None, "rope_frequencies": [[1.0]]}, "set 0 must hold head_dim/2 = 16 numbers, found 1"),
        ({"layer_attention": [[8]]}, "layer_attention must be a list of pairs"),
        ({"layer_attention": [[0, 0]]}, "layer_attention: a window must be greater than 0, found 0"),
        ({"layer_attention": [[None, 1]]}, "layer_attention: rotary set 1 of 1"),
        ({"layer_attention": [[None, 0]], "sliding_window": 8}, "sliding_window and layer_attention exclude"),
        ({"bos_token_id": 256}, "bos_token_id must be in"),
        ({"eos_token_id": -1}, "eos_token_id must be in"),
        ({"eos_token_id": [3, 256]}, r"eos_token_id must be in \[0, vocab_size = 256\), found 256"),
        ({"eos_token_id": []}, r"eos_token_id must be an integer or a list of at least one, found \[\]"),
        ({"eos_token_id": [3, True]}, "eos_token_id must be an integer or a list of at least one"),
        ({"eos_token_id": [[3]]}, "eos_token_id must be an integer or a list of at least one"),
        ({"bos_token_id": [3]}, "bos_token_id must be an integer"),
        ({"training_sequence_length": 1025}, "above max_position_embeddings"),
        ({"training_sequence_length": 0}, "training_sequence_length must be greater than 0"),
        ({"vocab_size": 255}, "the byte tokenizer needs vocab_size >= 256, found 255"),
    ],
)
def test_impossible_values_are_named(changes, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict(_example(**changes))


def test_impossible_values_are_reported_together() -> None:
    with pytest.raises(CheckpointError, match="3 problems"):
        ModelConfig.from_dict(_example(vocab_size=100, unroll_steps=0, rope_theta=-1.0))


def test_key_type_and_range_problems_are_reported_together() -> None:
    values = _example(dropout=0.1, rope_layout="neox", vocab_size=100, unroll_steps=0, eos_token_id=100, head_dim=0)
    del values["rope_theta"], values["num_attention_heads"]
    with pytest.raises(CheckpointError, match="8 problems") as caught:
        ModelConfig.from_dict(values)
    for problem in (
        "unknown key 'dropout'",
        "missing key 'rope_theta'",
        "missing key 'num_attention_heads'",
        "rope_layout must be one of",
        "unroll_steps must be greater than 0",
        "eos_token_id must be in [0, vocab_size = 100)",
        "the byte tokenizer needs vocab_size >= 256",
        "head_dim must be at least 1, found 0",
    ):
        assert str(caught.value).count(problem) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2"),
    ],
)
def test_known_values_this_version_cannot_do_are_unsupported(changes, message) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ModelConfig.from_dict(_example(**changes))


def test_a_vocabulary_below_256_needs_no_byte_tokenizer() -> None:
    assert ModelConfig.from_dict(_example(vocab_size=11, tokenizer="none")).vocab_size == 11


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: missing"),
        (b"{", "expected a JSON object, found something unreadable"),
        (b"\xff\xfe", "expected a JSON object, found something unreadable"),
        (b"[" * 100_000, "expected a JSON object, found something unreadable"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"rope_theta": ' + b"9" * 5000 + b"}", "expected a JSON object, found something unreadable"),
        (b'{"vocab_size": 1, "model_type": "x", "vocab_size": 2}', "the key 'vocab_size' stands twice in one object"),
        (json.dumps(_example(rope_theta=float("nan"))).encode(), "NaN is not a JSON number"),
        (
            json.dumps(_example(rope_theta=1)).encode().replace(b": 1,", b": 1e999,", 1),
            "num_hidden_layers must be an integer, found inf",
        ),
        (b"[" * 199 + b"{}" + b"]" * 199, "expected a JSON object, found list"),
        (b'{"a": ' * 201 + b"1" + b"}" * 201, "unknown key"),
        (b"{" + b" " * (1 << 20) + b"}", "expected at most 1 MiB"),
        (b"{}", "missing key 'hidden_size'"),
        (json.dumps(_example(format_version=3)).encode(), "format_version 3"),
    ],
)
def test_unusable_files_are_named(tmp_path, content, message) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises((CheckpointError, UnsupportedError), match=message) as caught:
        load_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("given", "ids"), [(None, ()), (3, (3,)), ([3], (3,)), ([7, 3, 7], (7, 3, 7))])
def test_a_sequence_may_have_several_ends(given, ids, tmp_path) -> None:
    config = ModelConfig.from_dict(_example(eos_token_id=given, bos_token_id=5))
    assert config.eos_token_ids == ids
    assert config.special_token_ids == {5, *ids}
    assert isinstance(hash(config), int)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert load_config(tmp_path) == config


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_place_of_the_file_is_refused_and_a_link_is_followed(tmp_path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "real.json").write_text(json.dumps(_example()))
    (tmp_path / "config.json").symlink_to("real.json")
    assert load_config(tmp_path).vocab_size == 256


def test_missing_folder_and_file_in_its_place(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a checkpoint folder .* found nothing"):
        load_config(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"expected a checkpoint folder .* found a file"):
        load_config(tmp_path / "file")


def test_dictionary_round_trip_keeps_every_value(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> None:
    for config in (tiny_config(), tiny_config(model_type="transformer", tie_word_embeddings=True)):
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"hidden_size": 2048, "num_hidden_layers": 1}, 215_035_136),
        ({"hidden_size": 1088, "num_hidden_layers": 6, "model_type": "transformer"}, 154_980_608),
        ({"hidden_size": 1120, "num_hidden_layers": 5}, 157_094_080),
        ({"hidden_size": 768, "num_hidden_layers": 12, "model_type": "transformer"}, 134_240_000),
    ],
)
def test_parameter_count_of_the_published_models(tiny_config, changes, parameters) -> None:
    inner = 4 * changes["hidden_size"]
    sizes = {"intermediate_size": inner, "correction_intermediate_size": inner, "num_attention_heads": 16}
    assert tiny_config(vocab_size=32000, **sizes, **changes).parameter_count == parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["context_ready_transformer", "transformer"])
def test_parameter_count_is_that_of_the_tensors(tiny_config, random_tensors, tied, kind) -> None:
    config = tiny_config(model_type=kind, tie_word_embeddings=tied)
    assert config.parameter_count == sum(tensor.numel() for tensor in random_tensors(config).values())
    assert set(tensor_shapes(config)) == set(random_tensors(config))


def test_config_loads_neither_torch_nor_onnx() -> None:
    code = "import sys, crt_export.config; sys.exit(bool({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
