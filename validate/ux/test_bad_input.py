"""Bad input of the command line: refused before any work, with one message, and nothing is left behind."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from crt_export import environment
from crt_export.checkpoint import WEIGHTS_FILE
from crt_export.cli import main

Make = Callable[..., Path]


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    message: str


Refuse = Callable[..., Outcome]


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """``refuse(*arguments)``: run the command line in a folder; nothing may be exported, written or left there."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> Outcome:
        before = sorted(folder.rglob("*"))
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert sorted(folder.rglob("*")) == before
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert not re.search(r"^export ", captured.err, re.MULTILINE)  # what the first stage with work reports
        assert captured.err.lower().count("error: ") == 1, captured.err
        return Outcome(code, captured.err)

    return run


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unroll", 0], "unroll must be 1 to 4096 passes of the prefill, found 0"),
        (["--unroll", 4097], "unroll must be 1 to 4096 passes of the prefill, found 4097"),
        (["--capacity", 0], "capacity must be at least 1 token, found 0"),
        (["--capacity", 65], "capacity 65 is above max_position_embeddings 64"),
        (["--validation-tokens", 4095], "validation_tokens must be at least 4096, found 4095"),
        (["--target", "ort-cpu-fp64"], "ort-cpu-fp64"),
        (["--target", "absent.toml"], "absent.toml"),
        (["--target", "ort-cpu-fp32", "--target", "ort-cpu-fp32"], "targets named more than once: ort-cpu-fp32"),
        (["--text", "a.txt", "--tokens", "a.npy"], "--text and --tokens exclude each other"),
        (["--text", "absent.txt"], "absent.txt: the text file cannot be read"),
        (["--tokens", "absent.npy"], "absent.npy: expected a .npy file of token ids"),
    ],
)
def test_impossible_options(refuse: Refuse, tiny_checkpoint: Path, arguments: list[object], message: str) -> None:
    if "--target" not in arguments:
        arguments = [*arguments, "--target", "ort-cpu-fp32"]
    outcome = refuse("build", tiny_checkpoint, "--output", "out", *arguments)
    assert outcome.code == 2
    assert message in outcome.message


@pytest.mark.parametrize("verb", ["build", "inspect", "generate", "validate"])
def test_missing_folder(refuse: Refuse, verb: str) -> None:
    more = {"build": ["--output", "out"], "generate": ["--prompt", "x"]}.get(verb, [])
    outcome = refuse(verb, "absent", *more)
    assert outcome.code == 2
    assert "absent" in outcome.message


@pytest.mark.parametrize("count", [1, 4096])
def test_text_too_short_to_validate_on(refuse: Refuse, tiny_checkpoint: Path, tmp_path: Path, count: int) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x" * count, encoding="utf-8")
    outcome = refuse("build", tiny_checkpoint, "--output", "out", "--target", "ort-cpu-fp32", "--text", text)
    assert outcome.code == 2
    assert f"{count} tokens are too few: validation needs 4097, so give at least 4097" in outcome.message


def test_text_too_short_for_its_last_window(refuse: Refuse, make_checkpoint: Make, tmp_path: Path) -> None:
    """Windows of 60 tokens: 69 of them take a few more tokens than 4096."""
    text = tmp_path / "short.txt"
    text.write_text("x" * 4100, encoding="utf-8")
    checkpoint = make_checkpoint(max_position_embeddings=60)
    outcome = refuse("build", checkpoint, "--output", "out", "--target", "ort-cpu-fp32", "--text", text)
    assert outcome.code == 2
    assert "69 windows of 60 tokens and one more to predict need 4141" in outcome.message


def test_text_that_leaves_too_little_for_more_validation_tokens(
    refuse: Refuse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x" * 9000, encoding="utf-8")
    target = ("--target", "ort-cpu-fp32", "--validation-tokens", 10_000)
    outcome = refuse("build", tiny_checkpoint, "--output", "out", "--text", text, *target)
    assert outcome.code == 2
    assert "give at least 10001" in outcome.message


def test_tokens_out_of_range(refuse: Refuse, tiny_checkpoint: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.full(9000, 256))
    target = ("--target", "ort-cpu-fp32", "--tokens", tmp_path / "tokens.npy")
    outcome = refuse("build", tiny_checkpoint, "--output", "out", *target)
    assert outcome.code == 2
    assert "9000 token ids are outside the vocabulary [0, 256), the first is 256 at index 0" in outcome.message


@pytest.mark.parametrize(
    ("kind", "message"),
    [("file", "is a file; expected a folder"), ("folder", "it is not a bundle, it has no manifest.json")],
)
def test_output_that_is_something_else(refuse: Refuse, tiny_checkpoint: Path, kind: str, message: str) -> None:
    output = Path("out")
    if kind == "file":
        output.write_text("mine", encoding="utf-8")
    else:
        output.mkdir()
        (output / "thesis.txt").write_text("mine", encoding="utf-8")
    outcome = refuse("build", tiny_checkpoint, "--output", output, "--target", "ort-cpu-fp32", "--unvalidated")
    assert outcome.code == 2
    assert message in outcome.message
    assert "build one with" not in outcome.message


@pytest.mark.parametrize("verb", [("build", "--output", "out", "--unvalidated"), ("inspect",)])
class TestCheckpoints:
    """The same refusals from both verbs that read checkpoints."""

    def check(self, refuse: Refuse, verb: tuple[str, ...], checkpoint: Path, *messages: str) -> None:
        outcome = refuse(verb[0], checkpoint, *verb[1:])
        assert outcome.code == 2
        for message in messages:
            assert message in outcome.message

    def test_pickle_offered_as_weights(self, refuse: Refuse, copy: Path, verb: tuple[str, ...]) -> None:
        (copy / WEIGHTS_FILE).write_bytes(pickle.dumps({"embed.weight": [1.0]}))
        self.check(refuse, verb, copy, "expected safetensors, found a pickle")

    def test_truncated_weights(self, refuse: Refuse, copy: Path, verb: tuple[str, ...]) -> None:
        (copy / WEIGHTS_FILE).write_bytes((copy / WEIGHTS_FILE).read_bytes()[:-1])
        self.check(refuse, verb, copy, "expected a complete safetensors file")

    def test_weights_that_are_not_numbers(self, refuse: Refuse, make_checkpoint: Make, verb: tuple[str, ...]) -> None:
        checkpoint = make_checkpoint(edit=lambda tensors: tensors["embed.weight"].fill_(torch.nan))
        self.check(refuse, verb, checkpoint, "tensor embed.weight has 8192 of 8192 values that are NaN or infinite")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("rope_theta", 10**400, "rope_theta must be a finite number"),
            ("layer_norm_eps", 10**400, "layer_norm_eps must be a finite number"),
            ("vocab_size", 1, "vocab_size must be at least 2"),
            ("max_position_embeddings", 2**40, "max_position_embeddings must be at most 1048576"),
        ],
    )
    def test_absurd_sizes(
        self, refuse: Refuse, copy: Path, verb: tuple[str, ...], key: str, value: int, message: str
    ) -> None:
        values = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        (copy / "config.json").write_text(json.dumps({**values, key: value}), encoding="utf-8")
        self.check(refuse, verb, copy, message)

    def test_vocabulary_smaller_than_the_tokenizers(
        self, refuse: Refuse, make_checkpoint: Make, verb: tuple[str, ...]
    ) -> None:
        checkpoint = make_checkpoint(vocab_size=3, tokenizer="tokenizer.json")
        words = {"a": 0, "b": 1, "c": 2, "d": 3}
        Tokenizer(models.WordLevel(words, unk_token="a")).save(str(checkpoint / "tokenizer.json"))
        self.check(refuse, verb, checkpoint, "has 4 tokens, more than the model's vocab_size 3")


def test_tokenizer_that_cannot_be_checked_is_said_and_the_rest_shown(
    make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(vocab_size=3, tokenizer="tokenizer.json")
    (checkpoint / "tokenizer.json").write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tokenizer_checked"] is False
    assert "tokenizer not checked" in captured.err
    assert "crt-export[text]" in captured.err


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPU, whatever this one has."""
    monkeypatch.setattr(environment, "gpus", lambda: ())


@pytest.mark.usefixtures("no_tensorrt")
def test_tensorrt_without_a_gpu_is_one_clear_error(refuse: Refuse, tiny_checkpoint: Path) -> None:
    outcome = refuse("build", tiny_checkpoint, "--output", "out", "--target", "trt-sm80-fp16")
    assert outcome.code == 3
    for part in (
        "trt-sm80-fp16 needs tensorrt 10.16 or newer (pip install 'crt-export[tensorrt]')",
        "an NVIDIA GPU of compute capability 8.0 or newer",
        "rtx-* targets compile without a GPU",
    ):
        assert outcome.message.count(part) == 1
    assert "leave out" not in outcome.message


@pytest.mark.usefixtures("no_tensorrt")
def test_what_else_was_asked_for_builds_without_the_tensorrt_target(refuse: Refuse, tiny_checkpoint: Path) -> None:
    targets = ("--target", "ort-cpu-fp32", "--target", "trt-sm80-fp16")
    outcome = refuse("build", tiny_checkpoint, "--output", "out", *targets)
    assert outcome.code == 3
    assert "nothing was built; leave out trt-sm80-fp16 and the rest builds" in outcome.message
