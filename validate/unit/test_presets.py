"""Presets have the published sizes, and ``crt-export init`` writes a whole checkpoint or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from crt_export.checkpoint import load_checkpoint
from crt_export.cli.app import app
from crt_export.errors import InputError
from crt_export.models.presets import PRESETS, write_preset
from crt_export.models.registry import model_from_checkpoint

#: architecture.md, "Published sizes and figures".
PUBLISHED = {
    "d1-2048": 215_035_136,
    "transformer-6x1088": 154_980_608,
    "d5-1120": 157_094_080,
    "transformer-12x768": 134_240_000,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_a_preset_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    config: Any = PRESETS[name]
    assert config.parameter_count == parameters
    assert (config.vocab_size, config.num_attention_heads, config.tie_word_embeddings) == (32_000, 16, False)


def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_preset("tiny", tmp_path / folder, seed=seed)
    first, same, other = (load_checkpoint(tmp_path / folder).sha256 for folder in "abc")
    assert first == same
    assert first != other


def test_the_recurrence_neither_dies_out_nor_blows_up(tmp_path: Path) -> None:
    """64 tokens keep the state near the size of an embedding, so that floats stay ordinary."""
    write_preset("tiny", tmp_path / "tiny")
    model = model_from_checkpoint(load_checkpoint(tmp_path / "tiny"))
    sizes = model.sequential(torch.arange(64)[None])[0].hidden.square().mean(dim=-1).sqrt()
    assert float(sizes.min()) > 0.1
    assert float(sizes.max()) < 10


def test_init_writes_what_build_reads(tmp_path: Path) -> None:
    arguments = ["init", "--preset", "tiny", "--seed", "5", "--output", str(tmp_path / "new" / "tiny"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["parameters"] == PRESETS["tiny"].parameter_count
    assert load_checkpoint(tmp_path / "new" / "tiny").config == PRESETS["tiny"]
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["tiny"], "nothing is left beside it"


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        write_preset("tiny", tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "seed", "message"),
    [("d5", 0, "one of d5-1120, d1-2048"), ("tiny", -1, "seed must be from 0")],
)
def test_what_cannot_be_is_refused(name: str, seed: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_preset(name, tmp_path / "out", seed=seed)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_preset("tiny", tmp_path / "file" / "out")


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_a_link_stays_and_its_folder_is_filled_and_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for link, target in (("empty", "disk/there"), ("dangling", "disk/new")):
        (tmp_path / link).symlink_to(target)
        if link == "empty":
            (tmp_path / target).mkdir()
        write_preset("tiny", tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert load_checkpoint(tmp_path / target).tensors
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="exists already"):
        write_preset("tiny", tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["new", "there"]
