"""A model that was trained with a begin-of-sequence token finds it at position 0, at every level and in every stage.

The model is made by hand: it knows its text (a chain of tokens) only while its attention finds the token, and is sure
of a wrong token otherwise, so a window without it has a perplexity of thousands.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from crt_export.bundle import MANIFEST_NAME, open_bundle
from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.models.base import LanguageModel
from crt_export.models.crt import ContextReadyTransformer
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity import ParityOptions, validate_bundle
from crt_export.parity.decoding import Decoding
from crt_export.parity.levels import LEVELS
from crt_export.parity.reference import STEP, Reference
from crt_export.parity.scores import reference_nll
from crt_export.parity.windows import windows_from_text
from crt_export.pipeline import BuildOptions, build
from crt_export.quantize.calibration import CalibrationOptions, calibrate, calibration_windows
from crt_export.stages.prefill import pass_limits
from crt_export.stages.vectors import make_vectors
from crt_export.text import TokenText, read_text
from crt_export.tokenizer import NoTokenizer

BOS, WRONG, LENGTH = 7, 6, 16
CHAIN = 6
SHORT = ParityOptions(
    validation_tokens=128,
    window=LENGTH,
    short_reason="test",
    threads=1,
    chain_windows=2,
    chain_steps=8,
    prompts=2,
    new_tokens=4,
    long_run_tokens=2000,
    levels=LEVELS,
)


def _write_weights(tensors: dict[str, torch.Tensor]) -> None:
    """Chain 0, 1, .. 5, 0, ..; attention looks for the token in channel 62 and says so in channel 63."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        elif name != "embed.weight":
            tensor.zero_()
    embed = torch.randn(tensors["embed.weight"].shape, generator=generator)
    embed[:, 62:] = 0
    embed[BOS] = 0
    embed[BOS, 62] = 8
    tensors["embed.weight"].copy_(embed)
    attention = {name: tensors[f"layers.0.attn.{name}"] for name in ("k.weight", "q.bias", "v.weight", "o.weight")}
    attention["k.weight"][15, 62] = 4  # the rotary pair of the lowest frequency
    attention["q.bias"][15] = 10
    attention["v.weight"][0, 62] = 1
    attention["o.weight"][63, 0] = 1.5
    states = (embed - embed.mean(1, keepdim=True)) / embed.std(1, keepdim=True, unbiased=False)
    for now in range(CHAIN):
        tensors["lm_head.weight"][(now + 1) % CHAIN] += states[now] * 0.5
    tensors["lm_head.weight"][WRONG, 63] = -12
    tensors["lm_head.bias"][WRONG] = 40


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Path], shared_traces: None) -> Checkpoint:
    """A recurrent model of one layer whose correction is zero."""
    return load_checkpoint(
        make_checkpoint(
            edit=_write_weights,
            vocab_size=64,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            unroll_steps=2,
            max_position_embeddings=256,
            training_sequence_length=32,
            rope_layout="half",
            tie_word_embeddings=False,
            tokenizer="none",
            bos_token_id=BOS,
        )
    )


@pytest.fixture(scope="session")
def bos_bundle(checkpoint: Checkpoint, shared_folder: Path) -> Path:
    """Built once, before anything is recorded."""
    output = shared_folder / "bos-bundle"
    with FileLock(output.with_suffix(".lock")):
        if not (output / MANIFEST_NAME).is_file():
            build(BuildOptions(checkpoint=checkpoint.path, output=output, targets=("ort-cpu-fp32",), validated=False))
    return output


def _text(count: int, bos: int | None = BOS) -> TokenText:
    return TokenText(ids=np.arange(count) % CHAIN, source="a chain", bos_token_id=bos)


def _nll(model: LanguageModel, text: TokenText) -> float:
    windows = windows_from_text(text, SHORT, longest=LENGTH, longest_reason="a test")
    return float(reference_nll(Reference(model, windows, batch=8), STEP, 1).mean())


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran from position 0; a row of it that begins with anything but the token fails the test."""
    seen: list[str] = []

    def look(what: str, ids: Any, position: Any) -> None:
        starts = np.asarray(ids)[np.asarray(position) == 0]
        if len(starts):
            seen.append(what)
            assert (starts[:, 0] == BOS).all(), f"{what} fed {starts[:, :4].tolist()} from position 0"
            assert not (starts[:, 1:2] == BOS).any(), f"{what} fed the token twice"

    run_pass, step, prefill = ContextReadyTransformer.run_pass, Decoding.step, Decoding.prefill

    def recorded_pass(self: ContextReadyTransformer, ids: Any, before: Any, position: Any, cache: Any) -> Any:
        if not ids.is_meta:  # what looks at a model's linears runs it on no tokens
            look("pytorch", ids, position)
        return run_pass(self, ids, before, position, cache)

    def recorded_step(self: Decoding, ids: np.ndarray) -> None:
        look("target", ids[:, None], np.array(self.position))
        step(self, ids)

    def recorded_prefill(self: Decoding, ids: np.ndarray, passes: int, **options: Any) -> None:
        look("target", ids, np.array(self.position))
        prefill(self, ids, passes, **options)

    monkeypatch.setattr(ContextReadyTransformer, "run_pass", recorded_pass)
    monkeypatch.setattr(Decoding, "step", recorded_step)
    monkeypatch.setattr(Decoding, "prefill", recorded_prefill)
    return seen


def test_a_window_without_the_token_is_seen_in_the_perplexity(checkpoint: Checkpoint) -> None:
    model = model_from_checkpoint(checkpoint)
    assert math.exp(_nll(model, _text(400))) < 2
    assert math.exp(_nll(model, _text(400, bos=None))) > 1000


def test_ids_that_hold_the_token_have_the_same_perplexity(checkpoint: Checkpoint) -> None:
    model = model_from_checkpoint(checkpoint)
    expected = _nll(model, _text(400))
    once = _text(400)
    blocks = np.insert(once.ids, np.arange(0, 400, LENGTH), BOS)  # before every LENGTH tokens
    inputs = np.insert(once.ids, np.arange(0, 400, LENGTH - 1), BOS)  # every LENGTH tokens
    for ids in (np.insert(once.ids, 0, BOS), blocks):
        assert _nll(model, dataclasses.replace(once, ids=ids)) == expected
    assert _nll(model, dataclasses.replace(once, ids=inputs)) == pytest.approx(expected, rel=0.2), "none is a target"


@pytest.mark.evidence  # builds a bundle; the windows are cut in one place, which the other tests hold
def test_every_level_of_a_bundle_starts_with_the_token(bos_bundle: Path, tmp_path: Path, recorder: list[str]) -> None:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, _text(2400).ids)
    seen_by_level: dict[str, int] = {}
    for level in LEVELS[1:]:  # the first one feeds what the user's file says
        recorder.clear()
        report = validate_bundle(bos_bundle, tokens=tokens, options=dataclasses.replace(SHORT, levels=(level,)))
        seen_by_level[level] = len(recorder)
        assert report.passed, report.failures
        assert any("begins with the model's bos_token_id 7" in note for note in report.notes)
        rows = [row for row in report.rows if row.reference_perplexity is not None]
        assert all(row.reference_perplexity < 2 for row in rows if row.reference_perplexity is not None)
    assert all(count for level, count in seen_by_level.items() if level != "contract"), seen_by_level
    assert open_bundle(bos_bundle, allow_unvalidated=True).manifest["config"]["bos_token_id"] == BOS


def test_calibration_limits_of_passes_and_vectors_start_with_the_token(
    checkpoint: Checkpoint, recorder: list[str]
) -> None:
    model, text = model_from_checkpoint(checkpoint), _text(6000)
    options = CalibrationOptions(windows=8, minimum_tokens=64)
    windows = calibration_windows(text.ids, seq=LENGTH, options=options, bos=text.bos_token_id)
    calibrate(model, windows, unroll=2, options=options)
    limits = pass_limits(checkpoint, text, LENGTH)
    assert limits is not None, "with the token the model predicts its text, so that there is a bound"
    for given in (text, None):
        vectors = make_vectors(checkpoint, None, [], given)
        assert vectors.input_ids[0] == BOS
    assert len(recorder) > 4


def test_text_that_is_read_knows_the_token(checkpoint: Checkpoint, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(12) % CHAIN)
    text = read_text(checkpoint.config, NoTokenizer(), tokens=tmp_path / "tokens.npy")
    assert text.bos_token_id == BOS
    assert text.ids.tolist()[:3] == [0, 1, 2], "the ids stay the file's own"
