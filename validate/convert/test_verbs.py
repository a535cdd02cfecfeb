"""The verbs ``convert`` and ``inspect``: results, progress, exit codes; nothing is written on failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crt_export.checkpoint import load_checkpoint
from crt_export.cli import main


def test_convert_writes_a_checkpoint_and_names_its_stages(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["convert", str(llama_folder), "--output", str(output), "--correction-size", "6", "--unroll", "2"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{output}: llama as a CRT with a correction of zero, ")
    stages = [line for line in shown.err.splitlines() if line.startswith("stage ")]
    assert [line[:12] for line in stages] == ["stage 1 of 3", "stage 2 of 3", "stage 3 of 3"]
    assert load_checkpoint(output).tensors["correction.up.weight"].shape == (6, 16)


def test_convert_as_json(llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    options = ["--plain", "--max-positions", "30", "--json"]
    assert main(["convert", str(llama_folder), "--output", str(output), *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["family"] == "llama"
    assert document["config"]["max_position_embeddings"] == 30
    assert document["parameters"] == load_checkpoint(output).config.parameter_count


@pytest.mark.parametrize("options", [["--plain", "--unroll", "2"], ["--max-positions", "0"]])
def test_convert_refuses_with_exit_code_2_and_writes_nothing(
    options: list[str], llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(llama_folder), "--output", str(tmp_path / "out"), *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len([line for line in shown.err.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_inspect_tells_what_a_source_is(llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llama_folder), "--capacity", "100", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "hugging face folder"
    assert (document["model_type"], document["converts"], document["dtypes"]) == ("llama", True, ["float32"])
    assert document["parameters"] == 2 * 97 * 16 + 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16
    assert document["state_bytes"] == 16 * 4
    assert document["cache_bytes_float32"] == 2 * 16 * 100 * 4  # keys and values of one layer
    assert document["cache_bytes_float16"] == document["cache_bytes_float32"] // 2
    assert main(["inspect", str(llama_folder)]) == 0
    assert "converts: 5,328 parameters, float32, 64 positions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "reason"), [("bloom", "alibi"), ("never_heard_of", "does not know it"), ("gemma2", "caps scores")]
)
def test_inspect_tells_why_a_source_does_not_convert(
    kind: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "transformers_version": "5.24.0"}))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["converts"] is False
    assert reason in document["reason"]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "does not convert: " in capsys.readouterr().out


def test_inspect_of_a_checkpoint_stays_what_it_was(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(llama_folder), "--output", str(tmp_path / "out"), "--plain"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "checkpoint"
