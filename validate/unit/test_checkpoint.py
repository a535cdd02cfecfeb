"""model.safetensors: what loads, and every unusable file refused with all its problems by name."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crt_export.checkpoint import (
    WEIGHTS_FILE,
    checkpoint_hash,
    copy_checkpoint,
    load_checkpoint,
    write_checkpoint,
)
from crt_export.errors import CheckpointError, UnsupportedError

Make = Callable[..., Path]


def _rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the stored tensors behind the writer's checks."""
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


def _change_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


# --- what loads
@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")]
)
@pytest.mark.parametrize("kind", ["context_ready_transformer", "transformer"])
def test_stored_values_arrive_as_float32(make_checkpoint: Make, random_tensors, dtype, stored, kind) -> None:
    checkpoint = load_checkpoint(make_checkpoint(dtype=dtype, model_type=kind))
    expected = random_tensors(checkpoint.config)
    assert checkpoint.stored_dtypes == (stored,)
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in checkpoint.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].to(dtype).float())


def test_dtypes_may_be_mixed(make_checkpoint: Make) -> None:
    folder = _rewrite(
        make_checkpoint(dtype=torch.float16),
        lambda tensors: tensors.update({"final_norm.bias": tensors["final_norm.bias"].float()}),
    )
    assert load_checkpoint(folder).stored_dtypes == ("F16", "F32")


def test_tied_head_has_no_tensor_of_its_own(make_checkpoint: Make) -> None:
    tensors = load_checkpoint(make_checkpoint(tie_word_embeddings=True)).tensors
    assert not [name for name in tensors if name.startswith("lm_head")]


def test_copy_has_the_same_hash_and_any_change_another(make_checkpoint: Make, tmp_path) -> None:
    checkpoint = load_checkpoint(make_checkpoint())
    copy_checkpoint(checkpoint, tmp_path / "copy")
    assert checkpoint_hash(tmp_path / "copy") == checkpoint.sha256 == load_checkpoint(tmp_path / "copy").sha256
    _change_config(tmp_path / "copy", unroll_steps=5)
    assert checkpoint_hash(tmp_path / "copy") != checkpoint.sha256
    copy_checkpoint(checkpoint, tmp_path / "copy")
    _rewrite(tmp_path / "copy", lambda tensors: tensors["embed.weight"][0, 0].add_(1))
    assert checkpoint_hash(tmp_path / "copy") != checkpoint.sha256


# --- unusable files
def test_missing_folder(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a checkpoint folder .* found nothing"):
        load_checkpoint(tmp_path / "absent")


def test_missing_weights(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match="missing, found no weights; save the weights with safetensors"):
        load_checkpoint(folder)


def test_unreadable_weights(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint()
    (folder / WEIGHTS_FILE).chmod(0)
    if os.geteuid() == 0:  # the superuser may read everything: refuse on behalf of the system
        open_file = os.open

        def refuse(path: Any, *arguments: Any, **options: Any) -> int:
            if str(path).endswith(WEIGHTS_FILE):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return open_file(path, *arguments, **options)

        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(Permission denied\)"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_file(make_checkpoint: Make, keep) -> None:
    folder = make_checkpoint()
    file = folder / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="expected a complete safetensors file"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", [b"hello world, no tensors here", b"\xff" * 4096, b"{" * 64])
def test_file_that_is_not_safetensors(make_checkpoint: Make, content) -> None:
    folder = make_checkpoint()
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="expected a complete safetensors file"):
        load_checkpoint(folder)


class _Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [None, 2, 4, 5])
def test_pickle_in_place_of_weights_is_refused_and_not_run(make_checkpoint: Make, tmp_path, protocol) -> None:
    folder, file = make_checkpoint(), tmp_path / "run"
    if protocol is None:
        torch.save({"embed.weight": _Bomb(file)}, folder / WEIGHTS_FILE)
    else:
        (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(_Bomb(file), protocol=protocol))
    with pytest.raises(CheckpointError, match="expected safetensors, found a pickle"):
        load_checkpoint(folder)
    assert not file.exists()


def test_pickle_beside_missing_weights_is_named_and_not_run(make_checkpoint: Make, tmp_path) -> None:
    folder = make_checkpoint()
    (folder / WEIGHTS_FILE).unlink()
    torch.save({"embed.weight": _Bomb(tmp_path / "run")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found only pytorch_model\.bin, which may run code"):
        load_checkpoint(folder)
    assert not (tmp_path / "run").exists()


# --- unusable tensors
def test_missing_extra_and_misshapen_tensors_are_reported_at_once(make_checkpoint: Make) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["layers.1.attn.q.bias"], tensors["correction.up.weight"]
        tensors["layers.2.attn.q.bias"] = torch.zeros(32)
        tensors["layers.0.mlp.up.weight"] = tensors["layers.0.mlp.up.weight"].T.contiguous()
        tensors["final_norm.bias"] = torch.zeros(1)

    with pytest.raises(CheckpointError, match="5 problems") as caught:
        load_checkpoint(_rewrite(make_checkpoint(), edit))
    for problem in (
        "missing tensor layers.1.attn.q.bias [32]",
        "missing tensor correction.up.weight [48, 32]",
        "unexpected tensor layers.2.attn.q.bias [32]",
        "tensor layers.0.mlp.up.weight has shape [32, 64], config.json asks for [64, 32]",
        "tensor final_norm.bias has shape [1], config.json asks for [32]",
    ):
        assert problem in str(caught.value)


def test_correction_of_a_concatenation_is_named(make_checkpoint: Make) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["correction.up.weight"] = torch.zeros(48, 64)

    with pytest.raises(CheckpointError, match="one of their concatenation cannot be expressed by this version"):
        load_checkpoint(_rewrite(make_checkpoint(), edit))


def test_correction_of_a_plain_transformer_is_unexpected(make_checkpoint: Make) -> None:
    with pytest.raises(CheckpointError, match=r"unexpected tensor correction\.down\.bias") as caught:
        load_checkpoint(_change_config(make_checkpoint(), model_type="transformer"))
    assert "6 problems" in str(caught.value)


def test_head_of_a_tied_model_is_unexpected_and_explained(make_checkpoint: Make) -> None:
    with pytest.raises(CheckpointError, match="a tied head has no weights of its own"):
        load_checkpoint(_change_config(make_checkpoint(), tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")],
)
def test_wrong_dtypes_are_reported_with_misshapen_tensors(make_checkpoint: Make, dtype, name) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["embed.weight"] = tensors["embed.weight"].to(dtype)
        tensors["final_norm.bias"] = torch.zeros(1)

    with pytest.raises(CheckpointError, match="2 problems") as caught:
        load_checkpoint(_rewrite(make_checkpoint(), edit))
    assert f"tensor embed.weight has dtype {name}, expected one of BF16, F16, F32" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_counted_by_tensor(make_checkpoint: Make, dtype) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["embed.weight"][3, :2] = torch.nan
        tensors["layers.1.mlp.down.bias"][0] = -torch.inf

    with pytest.raises(CheckpointError, match="2 problems") as caught:
        load_checkpoint(make_checkpoint(dtype=dtype, edit=edit))
    assert "tensor embed.weight has 2 of 8192 values that are NaN or infinite" in str(caught.value)
    assert "tensor layers.1.mlp.down.bias has 1 of 32 values" in str(caught.value)


def test_values_that_are_not_finite_are_reported_with_layout_problems(make_checkpoint: Make) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["final_norm.bias"]
        tensors["extra"] = torch.full((3,), torch.nan)
        tensors["embed.weight"] = tensors["embed.weight"].double()
        tensors["lm_head.weight"][0, 0] = torch.inf

    with pytest.raises(CheckpointError, match="5 problems") as caught:
        load_checkpoint(_rewrite(make_checkpoint(), edit))
    for problem in (
        "missing tensor final_norm.bias",
        "unexpected tensor extra [3]",
        "tensor embed.weight has dtype F64",
        "tensor extra has 3 of 3 values that are NaN or infinite",
        "tensor lm_head.weight has 1 of 8192 values that are NaN or infinite",
    ):
        assert problem in str(caught.value)


# --- tokenizer and configuration
def test_vocabulary_smaller_than_the_byte_tokenizers(make_checkpoint: Make) -> None:
    folder = _change_config(make_checkpoint(vocab_size=200, tokenizer="none"), tokenizer="byte")
    with pytest.raises(CheckpointError, match="the byte tokenizer needs vocab_size >= 256, found 200"):
        load_checkpoint(folder)


def test_named_tokenizer_file_must_exist(make_checkpoint: Make) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer 'tokenizer\.json', and that file is missing"):
        load_checkpoint(make_checkpoint(tokenizer="tokenizer.json"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dropout": 0.1}, CheckpointError, "unknown key 'dropout'"),
        ({"unroll_steps": 0}, CheckpointError, "unroll_steps must be greater than 0"),
        ({"sliding_window": 0}, CheckpointError, "sliding_window must be greater than 0"),
        ({"format_version": 2}, UnsupportedError, "format_version 2"),
    ],
)
def test_configuration_is_checked_before_the_weights(make_checkpoint: Make, changes, error, message) -> None:
    folder = _change_config(make_checkpoint(), **changes)
    (folder / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(error, match=message):
        load_checkpoint(folder)


# --- writing
def test_writer_refuses_tensors_that_do_not_fit_and_writes_nothing(tiny_config, random_tensors, tmp_path) -> None:
    tensors = random_tensors(tiny_config())
    del tensors["lm_head.bias"]
    with pytest.raises(CheckpointError, match=r"missing tensor lm_head\.bias"):
        write_checkpoint(tmp_path / "model", tiny_config(), tensors)
    assert not (tmp_path / "model").exists()


def test_written_configuration_reads_back_equal(tiny_config, random_tensors, tmp_path) -> None:
    for number, kind in enumerate(("context_ready_transformer", "transformer")):
        config = tiny_config(model_type=kind)
        folder = write_checkpoint(tmp_path / str(number), config, random_tensors(config))
        assert load_checkpoint(folder).config == config
