from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from crt_export.checkpoint import load_checkpoint
from crt_export.errors import InputError
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.quantize import calibration
from crt_export.quantize.calibration import CalibrationOptions, calibrate, calibration_windows
from crt_export.quantize.linears import linear_inputs

OPTIONS = CalibrationOptions(windows=64, minimum_tokens=1024)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> LanguageModel:
    return model_from_checkpoint(load_checkpoint(tiny_checkpoint))


@pytest.fixture(scope="module")
def windows(text_tokens: np.ndarray) -> np.ndarray:
    return calibration_windows(text_tokens, seq=32, options=OPTIONS)


def _observed(model: LanguageModel, run: Callable[[], object]) -> dict[str, torch.Tensor]:
    """Every input of the first linear of each group while ``run`` runs, [rows, channels]."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for group in linear_inputs(model.config):

        def hook(_module: object, inputs: tuple[torch.Tensor, ...], name: str = group.name) -> None:
            seen.setdefault(name, []).append(inputs[0].reshape(-1, inputs[0].shape[-1]))

        handles.append(model.get_submodule(group.linears[0]).register_forward_pre_hook(hook))
    run()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def test_extremes_cover_first_pass_later_passes_and_decoding(model: LanguageModel, windows: np.ndarray) -> None:
    ids = torch.from_numpy(windows)

    def every_regime() -> None:
        for passes in (1, 2, 3):
            model.head(model.unroll(ids, passes)[0].hidden)
        model.head(model.sequential(ids)[0].hidden)

    rows = _observed(model, every_regime)
    statistics = calibrate(model, windows, unroll=3, options=OPTIONS)
    for name, seen in statistics.inputs.items():
        np.testing.assert_allclose(seen.absmax, rows[name].abs().amax(0).numpy(), rtol=1e-4, atol=1e-5)
        assert seen.rows_seen == windows.size * 4


def test_regimes_have_equal_shares_of_the_sample(
    model: LanguageModel, windows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_SAMPLE_VALUES", 1)
    monkeypatch.setattr(calibration, "_MINIMUM_ROWS", 900)
    rows = calibrate(model, windows, unroll=3, options=OPTIONS).inputs["correction.up"].rows
    assert abs(len(rows) - 900) < 150
    # In the first pass the correction sees the embedding alone, which only depends on the token.
    first = model.correction.norm(model.embed(torch.arange(256))).numpy()  # type: ignore[union-attr]
    distance = np.abs(rows[:, None] - first[None]).max(axis=2).min(axis=1)
    assert 0.25 < (distance < 1e-6).mean() < 0.42


def test_the_same_text_gives_the_same_statistics(model: LanguageModel, windows: np.ndarray) -> None:
    one, other = (calibrate(model, windows, unroll=2, options=OPTIONS) for _ in range(2))
    for name in one.inputs:
        assert np.array_equal(one.inputs[name].rows, other.inputs[name].rows)


def test_a_plain_transformer_runs_one_pass(tiny_transformer_checkpoint: Path, windows: np.ndarray) -> None:
    model = model_from_checkpoint(load_checkpoint(tiny_transformer_checkpoint))
    statistics = calibrate(model, windows, unroll=5, options=OPTIONS)
    assert statistics.unroll == 1
    assert "correction.up" not in statistics.inputs
    assert all(seen.rows_seen == 2 * windows.size for seen in statistics.inputs.values())


def test_hooks_are_gone_afterwards(model: LanguageModel, windows: np.ndarray) -> None:
    calibrate(model, windows, unroll=1, options=OPTIONS)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_random_calibration_data_is_refused(model: LanguageModel) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 32))
    with pytest.raises(InputError, match="look random or shuffled"):
        calibrate(model, noise, unroll=2, options=OPTIONS)


def test_unusable_windows_are_refused_with_what_is_needed(model: LanguageModel, windows: np.ndarray) -> None:
    with pytest.raises(InputError, match="at least 2048 tokens, found 320"):
        calibrate(model, windows[:10], unroll=2)
    with pytest.raises(InputError, match="max_position_embeddings 64 tokens, found 128"):
        calibrate(model, windows[:64].reshape(-1, 128), unroll=2, options=OPTIONS)
    with pytest.raises(InputError, match="K must be at least 1"):
        calibrate(model, windows, unroll=0, options=OPTIONS)
    with pytest.raises(InputError, match="windows must be at least 1"):
        CalibrationOptions(windows=0)


def test_windows_are_spread_over_the_whole_text() -> None:
    tokens = np.arange(10_000)
    windows = calibration_windows(tokens, seq=100, options=CalibrationOptions(windows=20, minimum_tokens=1))
    assert windows.shape == (20, 100)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 9_999
    assert np.array_equal(windows, windows[:, :1] + np.arange(100))
    assert len(np.unique(windows)) == windows.size


def test_enough_windows_are_cut_for_the_minimum_and_no_more_than_there_are() -> None:
    assert calibration_windows(np.arange(3000), seq=10).shape == (205, 10)
    assert calibration_windows(np.arange(2100), seq=128).shape == (16, 128)


def test_short_text_is_refused_with_the_length_that_is_needed() -> None:
    with pytest.raises(InputError, match=r"at least 2100 tokens \(7 windows of 300\), found 2099"):
        calibration_windows(np.arange(2099), seq=300)
