"""Bad input: one clear message, exit code 2, nothing written."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crt_export import convert as convert_package
from crt_export.checkpoint import load_checkpoint, write_checkpoint
from crt_export.convert import convert
from crt_export.errors import CheckpointError, CrtExportError, InputError, UnsupportedError


@pytest.fixture
def source(llama_folder: Path) -> Path:
    """A tiny Llama that a test may damage, alone in its folder."""
    return llama_folder


def _refused(source: Path, kind: type[CrtExportError], *words: str, **options: Any) -> str:
    """The message of a refusal that left nothing behind."""
    output = source.parent / "out"
    with pytest.raises(kind) as caught:
        convert(source, output, **options)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert caught.value.exit_code == 2
    assert [entry.name for entry in source.parent.iterdir()] == [source.name]
    return message


def _split(source: Path) -> dict[str, str]:
    """Make two shards of the only file."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, source / file)
        index |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def _edit(source: Path, **values: Any) -> None:
    config = {**json.loads((source / "config.json").read_text()), **values}
    (source / "config.json").write_text(json.dumps(config))


def test_the_source_itself_converts(source: Path) -> None:
    made = convert(source, source.parent / "out")
    assert load_checkpoint(made.path).config == made.config


@pytest.mark.parametrize("where", ["nothing", "a file"])
def test_no_folder(where: str, tmp_path: Path) -> None:
    path = tmp_path / "source"
    if where == "a file":
        path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"expected a Hugging Face folder .* found {where}; hf download"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_config(source: Path) -> None:
    (source / "config.json").unlink()
    _refused(source, CheckpointError, "config.json: missing")


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": NaN}', '{"a": 1, "a": 2}'])
def test_a_config_that_is_no_object(source: Path, content: str) -> None:
    (source / "config.json").write_text(content)
    _refused(source, CheckpointError, "config.json", "JSON")


def test_no_model_type(source: Path) -> None:
    _edit(source, model_type=None)
    _refused(source, CheckpointError, "missing key 'model_type'")


def test_an_unknown_type(source: Path) -> None:
    _edit(source, model_type="never_heard_of")
    _refused(source, UnsupportedError, "model_type 'never_heard_of' is not converted", "llama")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", "sixteen", "hidden_size must be a whole number above 0, at most 16777216, found 'sixteen'"),
        ("hidden_size", None, "missing key 'hidden_size'"),
        ("num_hidden_layers", 0, "num_hidden_layers must be a whole number above 0"),
        ("num_attention_heads", True, "num_attention_heads must be"),
        ("rms_norm_eps", "small", "rms_norm_eps must be a finite number above 0"),
        ("tie_word_embeddings", 1, "tie_word_embeddings must be true or false"),
        ("rope_parameters", [], "rope_parameters must be an object"),
        ("rope_parameters", {"rope_type": "linear"}, "a number above 0 is needed for factor"),
        ("rope_parameters", {"rope_theta": "big"}, "a number above 0 is needed for rope_theta"),
        (
            "rope_parameters",
            {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
            "its parameters give no frequencies",
        ),
        ("rms_norm_eps", -1e-6, "rms_norm_eps must be a finite number above 0"),
        ("num_key_value_heads", 3, "not a multiple"),
        ("num_hidden_layers", 10**6, "num_hidden_layers must be at most 4096"),
        ("hidden_size", 2**40, "hidden_size must be a whole number above 0, at most"),
        ("head_dim", 2**24, "heads of 16777216 channels, expected at most 65536"),
        ("head_dim", 2**16, "describes a model of"),
        ("vocab_size", 2**24, "describes a model of"),
        ("max_position_embeddings", 2**40, "at most"),
        ("eos_token_id", "end", "eos_token_id must be an integer"),
    ],
)
def test_values_of_the_wrong_kind(source: Path, key: str, value: Any, words: str) -> None:
    _edit(source, **{key: value})
    _refused(source, CheckpointError, words)


def test_a_missing_shard(source: Path) -> None:
    _split(source)
    (source / "model-00002-of-00002.safetensors").unlink()
    _refused(source, CheckpointError, "model-00002-of-00002.safetensors is missing")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", ""])
def test_an_index_that_points_outside(source: Path, name: str) -> None:
    index = _split(source)
    index["model.norm.weight"] = name
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    _refused(source, CheckpointError, "is no name of a file in this folder")


def test_an_index_that_names_the_wrong_shard(source: Path) -> None:
    index = _split(source)
    index["model.norm.weight"] = next(one for one in index.values() if one != index["model.norm.weight"])
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    _refused(source, CheckpointError, "model.norm.weight")


@pytest.mark.parametrize("kept", [0, 4, 40, -1, -4096])
def test_a_truncated_file(source: Path, kept: int) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    _refused(source, CheckpointError, "model.safetensors: expected")


def test_a_truncated_shard_is_named(source: Path) -> None:
    _split(source)
    file = source / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    _refused(source, CheckpointError, "model-00002-of-00002.safetensors", "it is cut off")


def test_something_behind_the_tensors(source: Path) -> None:
    with (source / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    _refused(source, CheckpointError, "something follows the last tensor")


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: {**entry, "shape": [-1, 16]},
        lambda entry: {**entry, "shape": [2**62, 2**62]},
        lambda entry: {**entry, "shape": "all"},
        lambda entry: {**entry, "data_offsets": [0, 8]},
        lambda entry: {**entry, "data_offsets": [8, 2**63]},
        lambda entry: {**entry, "data_offsets": None},
        lambda entry: {**entry, "data_offsets": [float(one) for one in entry["data_offsets"]]},
        lambda entry: [],
    ],
)
def test_a_header_that_lies(source: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = source / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["lm_head.weight"] = change(header["lm_head.weight"])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    _refused(source, CheckpointError, "model.safetensors: expected a complete safetensors file")


def test_pickled_weights_come_with_the_lines_that_convert_them(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    message = _refused(source, CheckpointError, "pytorch_model.bin", "never loaded")
    lines = [line.strip() for line in message.splitlines()[1:]]
    assert len(lines) == 3
    assert "weights_only=True" in lines[0]
    here = Path.cwd()
    os.chdir(source)  # and they do what they promise
    try:
        exec("import torch, safetensors.torch\n" + "\n".join(lines))
    finally:
        os.chdir(here)
    convert(source, source.parent / "out")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantised_weights(source: Path, method: str) -> None:
    _edit(source, quantization_config={"quant_method": method})
    _refused(source, UnsupportedError, "quantised", method)


def test_tensors_of_integers(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 16, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors")
    _refused(source, CheckpointError, "up_proj.weight has dtype int8, expected one of F32, F16, BF16")


def test_an_adapter_that_is_not_merged(source: Path) -> None:
    (source / "config.json").unlink()
    (source / "adapter_config.json").write_text("{}")
    _refused(source, UnsupportedError, "adapter", "merge_and_unload")


def test_remote_code(source: Path) -> None:
    _edit(source, auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    _refused(source, UnsupportedError, "auto_map", "never run")


def test_tensors_that_are_missing_misshapen_or_left_over_are_named_at_once(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(96, 16)
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(2)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(24, 16)
    save_file(tensors, source / "model.safetensors")
    _refused(
        source,
        CheckpointError,
        "4 problems",
        "missing tensor model.norm.weight [16]",
        "tensor lm_head.weight has shape [96, 16], config.json asks for [97, 16]",
        "tensor model.layers.0.self_attn.sinks [2] has no place in the model",
        "tensor model.layers.1.mlp.up_proj.weight [24, 16] has no place in the model",
    )


def test_values_that_are_not_finite(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors")
    _refused(source, CheckpointError, "layers.0.mlp.up.weight (made of model.layers.0.mlp.up_proj.weight)", "NaN")


@pytest.mark.parametrize("content", ["a file", "another file in a folder", "a folder of theirs"])
def test_an_output_that_is_no_checkpoint(source: Path, content: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if content == "a file":
        output.write_bytes(b"mine")
    elif content == "another file in a folder":
        output.mkdir()
        (output / "mine.txt").write_bytes(b"mine")
    else:
        shutil.copytree(source, output)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"is a file|exists and is no checkpoint"):
        convert(source, output)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_source_is_never_its_own_output(source: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        convert(source, source)


def test_a_checkpoint_is_replaced_whole_or_kept(source: Path) -> None:
    output = source.parent / "out"
    first = convert(source, output, plain=True)
    (output / "chat_template.jinja").write_text("of before")
    assert convert(source, output).config != first.config
    assert sorted(entry.name for entry in output.iterdir()) == ["config.json", "model.safetensors"]
    (output / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files, such as notes\.txt"):
        convert(source, output)
    (output / "notes.txt").unlink()
    kept = load_checkpoint(output).sha256
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="infinite"):
        convert(source, output)
    assert load_checkpoint(output).sha256 == kept
    assert sorted(entry.name for entry in source.parent.iterdir()) == ["out", "source"]


def test_a_checkpoint_of_this_package_is_no_source(source: Path, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "out", plain=True)
    write_checkpoint(tmp_path / "own", made.config, load_checkpoint(made.path).tensors)
    with pytest.raises(UnsupportedError, match="a checkpoint of this package already"):
        convert(tmp_path / "own", tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plain": True, "correction_size": 4}, "a plain transformer has no correction"),
        ({"plain": True, "unroll": 4}, "a plain transformer has no correction"),
        ({"correction_size": 10**12}, "correction_size must be from 1 to 1048576, found 1000000000000"),
        ({"correction_size": 0}, "correction_size must be from 1 to 1048576"),
        ({"unroll": 0}, "unroll must be from 1 to 4096"),
        ({"max_positions": 0}, "max_positions must be from 1 to 1048576"),
    ],
)
def test_options_that_are_unusable(source: Path, options: dict[str, Any], words: str) -> None:
    _refused(source, InputError, words, **options)


def test_links_of_a_download_cache_are_followed(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for entry in source.iterdir():
        (snapshot / entry.name).symlink_to(entry)
    assert convert(snapshot, tmp_path / "out").family == "llama"


def test_transformers_is_never_imported() -> None:
    files = list(Path(convert_package.__path__[0]).glob("*.py"))
    assert len(files) > 15
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "transformers"], file
