from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crt_export.config import ModelConfig
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_class, state_dict_from_tensors
from crt_export.quantize.calibration import ActivationStatistics
from crt_export.quantize.smoothing import FP16_LIMIT, fold, smoothing_factors

Arrays = dict[str, np.ndarray]
CONFIGS: tuple[dict[str, Any], ...] = (
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 2, "tie_word_embeddings": True},
    {"model_type": "transformer", "rope_layout": "half"},
)


def _model(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> LanguageModel:
    model = model_class(config.model_type)(config)
    model.load_state_dict(state_dict_from_tensors(config, tensors))
    model.reset_tables()
    return model.eval().requires_grad_(False)


def _fold(model: LanguageModel, statistics: ActivationStatistics) -> tuple[Arrays, Arrays, LanguageModel]:
    """Factors, folded tensors, and the model of them."""
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    before = {name: tensor.copy() for name, tensor in tensors.items()}
    factors = smoothing_factors(tensors, model.config, statistics)
    folded = fold(tensors, model.config, factors)
    assert all(np.array_equal(tensors[name], before[name]) for name in before), "the input was changed"
    smooth = type(model)(model.config)
    smooth.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in folded.items()})
    smooth.reset_tables()
    return factors, folded, smooth.eval().requires_grad_(False)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(changes=st.sampled_from(CONFIGS), seed=st.integers(0, 99), factor=st.floats(1, 200))
def test_the_folded_model_computes_bit_for_bit_the_same(
    changes: dict[str, Any],
    seed: int,
    factor: float,
    tiny_config: Callable[..., ModelConfig],
    random_tensors: Callable[..., dict[str, torch.Tensor]],
    with_outliers: Callable[[LanguageModel, float], LanguageModel],
    calibrated: Callable[[LanguageModel], ActivationStatistics],
) -> None:
    config = tiny_config(**changes)
    model = with_outliers(_model(config, random_tensors(config, seed)), factor)
    factors, _, smooth = _fold(model, calibrated(model))
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(seed))
    for passes in (1, 3):
        h = model.unroll(ids, passes)[0].hidden
        g = smooth.unroll(ids, passes)[0].hidden
        assert torch.equal(h, g)
        assert torch.equal(model.head(h), smooth.head(g))
    for channels in factors.values():
        assert np.array_equal(np.log2(channels), np.round(np.log2(channels))), "not powers of two"


@pytest.fixture
def model(
    tiny_config: Callable[..., ModelConfig], random_tensors: Callable[..., dict[str, torch.Tensor]]
) -> LanguageModel:
    return _model(tiny_config(), random_tensors(tiny_config()))


def test_outlier_channels_are_levelled(
    model: LanguageModel,
    with_outliers: Callable[[LanguageModel, float], LanguageModel],
    calibrated: Callable[[LanguageModel], ActivationStatistics],
) -> None:
    model = with_outliers(model, 50.0)
    statistics = calibrated(model)
    factors, _, _ = _fold(model, statistics)
    for name in ("correction.up", "layers.0.attn.qkv", "layers.1.mlp.up", "lm_head"):
        absmax = statistics.inputs[name].absmax
        levelled = absmax / factors[name]
        assert absmax.max() / np.median(absmax) > 20
        assert levelled.max() / np.median(levelled) < 4


def test_even_channels_and_those_behind_a_gelu_are_left_alone(
    model: LanguageModel,
    calibrated: Callable[[LanguageModel], ActivationStatistics],
) -> None:
    factors, _, _ = _fold(model, calibrated(model))
    assert np.all(factors["layers.0.mlp.down"] == 1)
    assert np.median(factors["layers.0.mlp.up"]) == 1


@pytest.mark.parametrize("gain", [1e-6, 1e6])
def test_folded_norms_fit_into_half_precision_whatever_the_gains(
    gain: float,
    model: LanguageModel,
    calibrated: Callable[[LanguageModel], ActivationStatistics],
) -> None:
    norm = model.get_submodule("layers.0.mlp_norm")
    for parameter in norm.parameters():
        parameter.data[3] *= gain
    model.get_parameter("layers.0.mlp.up.weight").data[3] /= gain
    _, folded, _ = _fold(model, calibrated(model))
    values = np.abs(folded["layers.0.mlp_norm.weight"])
    assert values.max() < FP16_LIMIT
    assert values[3] > 2.0**-14, "the folded gain is subnormal in FP16"
