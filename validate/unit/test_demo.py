"""The demo of examples/: its text, its checkpoint, the figures quoted for it, and its training script."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch.nn import functional as F

from crt_export.checkpoint import WEIGHTS_FILE, load_checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import InputError
from crt_export.models.registry import model_from_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return tomllib.loads((DEMO / "training.toml").read_text())


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return json.loads((DEMO / "figures.json").read_text())


@pytest.fixture(scope="module")
def losses(demo_checkpoint: Path, heldout_text: Path, figures: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Mean loss per consecutive 128-byte window, measured here without the demo's own script."""
    model = model_from_checkpoint(load_checkpoint(demo_checkpoint))
    tokens = torch.tensor(list(heldout_text.read_bytes()))
    count = (len(tokens) - 1) // 128
    ids, targets = tokens[: count * 128].view(count, 128), tokens[1 : count * 128 + 1].view(count, 128)
    regimes, iterate = {"sequential": model.sequential(ids)[0].hidden}, None
    for k in range(1, 17):
        done = model.unroll(ids, 1, iterate=iterate)[0]
        iterate = done.states
        if str(k) in figures["perplexity"]:
            regimes[str(k)] = done.hidden
    return {
        name: F.cross_entropy(model.head(h).transpose(1, 2), targets, reduction="none").double().mean(dim=1)
        for name, h in regimes.items()
    }


# --- text and checkpoint
def test_texts_are_those_of_the_recipe_and_their_licence_is_beside_them(recipe) -> None:
    for text in recipe["text"].values():
        assert hashlib.sha256((DEMO / text["file"]).read_bytes()).hexdigest() == text["sha256"]
    assert set(recipe["text"]) == {"train", "heldout"}
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (DEMO / "LICENSE.PSF.txt").read_text()


def test_heldout_text_is_the_last_tenth_and_its_repeats_are_counted(train_text, heldout_text, figures) -> None:
    train, heldout = train_text.read_bytes(), heldout_text.read_bytes()
    assert (len(train), len(heldout)) == (419_576, 46_619)
    runs = {train[start : start + 64] for start in range(len(train) - 63)}
    windows = [heldout[start : start + 128] for start in range(0, 364 * 128, 128)]
    new = [window for window in windows if not any(window[at : at + 64] in runs for at in range(65))]
    assert figures["without_repeats"]["windows"] == len(new)


def test_checkpoint_is_the_recipes_model_and_small(recipe, demo_checkpoint) -> None:
    checkpoint = load_checkpoint(demo_checkpoint)
    assert checkpoint.config == ModelConfig.from_dict(recipe["model"])
    assert (checkpoint.config.max_position_embeddings, checkpoint.config.training_sequence_length) == (32768, 128)
    assert sum(file.stat().st_size for file in demo_checkpoint.iterdir()) < 3 * MEBIBYTE


# --- figures
# The next two run the model over 46,000 tokens ten times; its arithmetic is tested on tiny models.
@pytest.mark.evidence
def test_perplexities_reach_the_target(losses) -> None:
    perplexity = {name: math.exp(values.mean().item()) for name, values in losses.items()}
    assert perplexity["sequential"] <= 3.8
    assert abs(perplexity["sequential"] - perplexity["10"]) <= 0.002


@pytest.mark.evidence
def test_figures_file_holds_what_is_measured(losses, figures, demo_checkpoint) -> None:
    assert figures["checkpoint_sha256"] == load_checkpoint(demo_checkpoint).sha256
    assert (figures["text"]["windows"], figures["text"]["tokens"]) == (364, 364 * 128)
    assert losses.keys() == figures["perplexity"].keys()
    for name, values in losses.items():
        assert figures["perplexity"][name] == pytest.approx(math.exp(values.mean().item()), abs=1e-4)
    difference, gap = losses["sequential"] - losses["10"], figures["sequential_minus_k10"]
    half_width = 1.96 * difference.std().item() / 364**0.5
    assert gap["nll"] == pytest.approx(difference.mean().item(), abs=1e-5)
    assert gap["nll_half_width_95"] == pytest.approx(half_width, rel=0.01)
    assert gap["perplexity_half_width_95"] == pytest.approx(half_width * figures["perplexity"]["10"], rel=0.01)


def test_figures_converge_with_the_number_of_passes(figures) -> None:
    perplexity = figures["perplexity"]
    assert list(perplexity) == ["1", "2", "3", "4", "5", "6", "8", "10", "16", "sequential"]
    error = {k: abs(value - perplexity["sequential"]) for k, value in perplexity.items()}
    assert error["1"] > error["2"] > error["3"] > 10 * error["16"]


def test_readme_quotes_the_figures_file(figures) -> None:
    readme = (DEMO / "README.md").read_text()
    rows = dict(re.findall(r"^\| (\d+|sequential) \| (\d+\.\d{3}) \|$", readme, flags=re.MULTILINE))
    assert rows == {name: f"{value:.3f}" for name, value in figures["perplexity"].items()}
    gap = figures["sequential_minus_k10"]
    assert f"{gap['perplexity']:+.5f} ± {gap['perplexity_half_width_95']:.5f}" in readme
    assert figures["date"] in readme
    assert figures["hardware"] in readme


def test_the_page_of_results_quotes_them_too(figures) -> None:
    text = " ".join((DEMO.parents[1] / "docs" / "results" / "parity.md").read_text().split())
    quoted = dict(re.findall(r"(?:K=(?=\d+ \d))?(\d+|sequential) (\d+\.\d{3,4})[,;]", text))
    expected = {
        name: f"{figures['perplexity'][name]:.{len(quoted[name]) - 2}f}"[: len(quoted[name])] for name in quoted
    }
    assert {"1", "2", "5", "10", "sequential"} <= quoted.keys()
    assert quoted == expected
    gap = figures["sequential_minus_k10"]
    assert f"{gap['perplexity']:.5f} +- {gap['perplexity_half_width_95']:.5f}" in text


# --- scripts
@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the training script in this process; importing torch anew would take longer than the steps."""
    monkeypatch.syspath_prepend(str(DEMO))
    for name in ("train", "recipe"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    script = importlib.import_module("train")
    return lambda *arguments: CliRunner().invoke(script.main, [*map(str, arguments)])


def test_resumed_training_is_bit_identical_to_a_straight_one(train, tmp_path) -> None:
    state = tmp_path / "state.pt"
    common = ("--steps", 4, "--seed", 7, "--state", state)
    assert train(*common, "--output", tmp_path / "straight").exit_code == 0
    assert not state.exists()
    torch.manual_seed(1)
    stopped = train(*common, "--output", tmp_path / "resumed", "--stop-after", 2)
    assert (stopped.exit_code, "stopped after step 2" in stopped.stderr) == (0, True)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["state.pt", "straight"]

    torch.manual_seed(2)
    assert train(*common, "--output", tmp_path / "resumed", "--resume").exit_code == 0
    straight, resumed = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("straight", "resumed"))
    assert set(straight) == set(resumed)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_unfinished_training_is_neither_overwritten_nor_resumed_as_another(train, tmp_path) -> None:
    state, output = tmp_path / "state.pt", tmp_path / "model"
    nothing = train("--steps", 2, "--state", state, "--output", output, "--resume")
    assert (nothing.exit_code, "no training state to resume" in " ".join(nothing.stderr.split())) == (2, True)
    assert train("--steps", 2, "--state", state, "--output", output, "--stop-after", 1).exit_code == 0
    before = state.read_bytes()
    again = train("--steps", 2, "--state", state, "--output", output)
    assert (again.exit_code, "continue it with --resume" in again.stderr) == (2, True)
    another = train("--steps", 2, "--seed", 8, "--state", state, "--output", output, "--resume")
    assert (another.exit_code, "a training with another schedule" in another.stderr) == (2, True)
    assert state.read_bytes() == before
    assert not output.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupted_training_saves_its_state_and_exits_130(tmp_path) -> None:
    state = tmp_path / "state.pt"
    with subprocess.Popen(
        [sys.executable, str(DEMO / "train.py"), "--output", str(tmp_path / "model"), "--state", str(state)],
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TTY_COMPATIBLE": "1"},
        text=True,
    ) as process:
        assert process.stderr is not None
        while "K=" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert torch.load(state, weights_only=True)["step"] >= 1
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.usefixtures("train")
def test_changed_text_is_refused(tmp_path) -> None:
    for name in ("training.toml", "train.txt"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    (tmp_path / "heldout.txt").write_bytes((DEMO / "heldout.txt").read_bytes() + b"!")
    with pytest.raises(InputError, match=r"heldout\.txt: expected SHA-256 [0-9a-f]{64}, found"):
        sys.modules["recipe"].load_recipe(tmp_path / "training.toml")
