"""Weights in one file or in shards are the same model; other files are named, never loaded or hung on."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crt_export.checkpoint import (
    INDEX_FILE,
    WEIGHTS_FILE,
    checkpoint_files,
    checkpoint_hash,
    copy_checkpoint,
    load_checkpoint,
)
from crt_export.errors import CheckpointError

Make = Callable[..., Path]


def shards(folder: Path, count: int = 3) -> dict[str, str]:
    """Split a checkpoint as save_pretrained does; the index's weight_map."""
    tensors = load_file(folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).unlink()
    names, where = sorted(tensors), {}
    for part in range(count):
        file = f"model-{part + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in names[part::count]}, folder / file)
        where |= dict.fromkeys(names[part::count], file)
    write_index(folder, where)
    return where


def write_index(folder: Path, where: dict[str, Any]) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_are_the_same_model_as_one_file(make_checkpoint: Make, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint(dtype=dtype)
    whole = load_checkpoint(folder)
    tensors = {name: tensor.clone() for name, tensor in whole.tensors.items()}
    shards(folder)
    split = load_checkpoint(folder)
    assert list(split.tensors) == list(tensors)
    assert all(torch.equal(split.tensors[name], tensor) for name, tensor in tensors.items())
    assert split.stored_dtypes == whole.stored_dtypes
    assert len(checkpoint_files(folder)) == 5
    copy_checkpoint(split, tmp_path / "copy")
    assert load_checkpoint(tmp_path / "copy").sha256 == split.sha256 != whole.sha256
    last = tmp_path / "copy" / "model-00003-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-1] + b"\1")
    assert checkpoint_hash(tmp_path / "copy") != split.sha256


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_a_download_cache_of_links_is_followed(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint()
    shards(folder)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    assert load_checkpoint(linked).sha256 == load_checkpoint(folder).sha256


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _moved(where: dict[str, str]) -> dict[str, str]:
    return {**where, "embed.weight": SECOND if where["embed.weight"] == FIRST else FIRST}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder, where: (folder / SECOND).unlink(), f"{SECOND} is missing"),
        (lambda folder, where: write_index(folder, _moved(where)), "tensor embed.weight is not in"),
        (lambda folder, where: write_index(folder, where | {"extra": FIRST}), f"tensor extra is not in {FIRST}"),
        (
            lambda folder, where: write_index(folder, {k: v for k, v in where.items() if k != "embed.weight"}),
            "tensor embed.weight is in .* has none",
        ),
        (lambda folder, where: write_index(folder, dict.fromkeys(where, FIRST)), "that the index does not name"),
        (lambda folder, where: write_index(folder, where | {"x": "../" + FIRST}), "no name of a file in this folder"),
        (lambda folder, where: write_index(folder, where | {"x": "/etc/passwd"}), "no name of a file in this folder"),
        (lambda folder, where: write_index(folder, where | {"x": 7}), "expected .*weight_map"),
        (lambda folder, where: write_index(folder, {}), "expected .*weight_map"),
        (lambda folder, where: (folder / INDEX_FILE).write_text("[]"), "expected .*weight_map"),
        (lambda folder, where: (folder / INDEX_FILE).write_text("[" * 100_000), "index of shards as JSON"),
        (lambda folder, where: (folder / INDEX_FILE).write_text('{"a": 1, "a": 2}'), "the key 'a' stands twice"),
        (lambda folder, where: os.truncate(folder / INDEX_FILE, 2**40), "at most 128 MiB"),
        (lambda folder, where: (folder / INDEX_FILE).unlink(), "found shards only"),
        (lambda folder, where: shutil.copy(folder / FIRST, folder / WEIGHTS_FILE), "holds both"),
        (lambda folder, where: os.truncate(folder / SECOND, 100), f"{SECOND}: expected a complete safetensors file"),
        (lambda folder, where: _as_pipe(folder / SECOND), f"{SECOND}: cannot be read .it is a pipe"),
        (lambda folder, where: _as_pipe(folder / INDEX_FILE), "it is a pipe"),
    ],
)
def test_shards_that_do_not_fit_their_index(
    make_checkpoint: Make, damage: Callable[[Path, dict[str, str]], object], words: str
) -> None:
    folder = make_checkpoint()
    damage(folder, shards(folder, 2))
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(folder)


def _as_pipe(file: Path) -> None:
    if os.name != "posix":
        pytest.skip("pipes of POSIX")
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (
            "pytorch_model.bin",
            "found only pytorch_model.bin, which may run code when loaded; load it where you trust it",
        ),
        ("pytorch_model-00001-of-00002.bin", "may run code"),
        ("consolidated.00.pth", "found only consolidated.00.pth, which may run code"),
        ("model.pt", "may run code"),
        ("adapter_model.safetensors", "is an adapter, not a model; merge it"),
        ("model-q4_0.gguf", "is a GGUF file"),
        ("weights.safetensors", "is not called model.safetensors; rename it"),
        ("tf_model.h5", "is of another framework"),
        ("notes.txt", "found no weights"),
    ],
)
def test_other_weights_are_named_with_what_to_do(make_checkpoint: Make, file: str, words: str) -> None:
    folder = make_checkpoint()
    (folder / WEIGHTS_FILE).rename(folder / file)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(folder)


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS_FILE, "tokenizer.json"])
def test_a_file_of_another_kind_is_refused_and_never_waited_for(make_checkpoint: Make, name: str) -> None:
    folder = make_checkpoint(tokenizer="tokenizer.json")
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(CheckpointError, match=r"it is a|no regular file"):
            load_checkpoint(folder)
        if (folder / name).is_dir():
            (folder / name).rmdir()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**62, 2, 0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        {"dtype": "C64", "shape": [], "data_offsets": [0, 8]},
        {"shape": [1]},
        [],
    ],
)
def test_a_header_of_whatever_kind_is_bad_input(make_checkpoint: Make, entry: object) -> None:
    folder = make_checkpoint()
    header = json.dumps({"embed.weight": entry}).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


@pytest.mark.parametrize("length", [0, 2**27, 2**63 - 1, 2**64 - 1])
def test_a_header_longer_than_the_file_is_bad_input(make_checkpoint: Make, length: int) -> None:
    folder = make_checkpoint()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", length) + b"{}" * 20)
    with pytest.raises(CheckpointError, match="expected a complete safetensors file"):
        load_checkpoint(folder)


@pytest.mark.parametrize("start", [b"\x80\x02", b"PK", b"\x80\x05"])
def test_a_header_whose_length_looks_like_a_pickle_is_none(make_checkpoint: Make, start: bytes) -> None:
    """The first bytes of a safetensors file are the length of its header, whatever they spell."""
    folder = make_checkpoint()
    content = (folder / WEIGHTS_FILE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    longer = next(size for size in range(length, 2**20) if size.to_bytes(8, "little")[:2] == start)
    header = content[8 : 8 + length].ljust(longer)
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", longer) + header + content[8 + length :])
    assert load_checkpoint(folder).tensors
