from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from crt_export.checkpoint import load_checkpoint
from crt_export.errors import InputError, UnsupportedError
from crt_export.model import Model, model_from_checkpoint
from crt_export.quantize import ActivationStatistics, W8A8Options, W8A8Plan, emulate_w8a8, linear_names, plan_w8a8
from crt_export.quantize.ranges import LARGEST_SCALE, SMALLEST_SCALE, quantize_columns, scale_from_range, value_range

Calibrated = Callable[[Model], ActivationStatistics]


#: Root mean square error of the logits, relative to their spread: what 8 bits cost these untrained models.
CLOSE = 0.03


def _model(path: Path) -> Model:
    return model_from_checkpoint(load_checkpoint(path))


def _logit_error(model: Model, plan: W8A8Plan) -> float:
    ids = torch.arange(97, 121)[None]
    exact = model.head(model.sequential(ids)[0])
    found = emulate_w8a8(model, plan)
    return float((found.head(found.sequential(ids)[0]) - exact).square().mean().sqrt() / exact.std())


def _assert_usable(plan: W8A8Plan) -> None:
    scales = [q.scale for q in plan.inputs.values()] + [s for q in plan.linears.values() for s in q.weight_scale]
    assert all(SMALLEST_SCALE <= scale <= LARGEST_SCALE for scale in scales)
    assert all(np.isfinite(q.bias).all() for q in plan.linears.values() if q.bias is not None)
    assert all(np.abs(q.weight).max() <= 127 for q in plan.linears.values())


def test_a_plan_covers_every_linear_and_stays_close_to_the_model(tiny_checkpoint: Path, calibrated: Calibrated) -> None:
    model = _model(tiny_checkpoint)
    plan = plan_w8a8(model, calibrated(model))
    assert set(plan.linears) == set(linear_names(model.config))
    _assert_usable(plan)
    assert _logit_error(model, plan) < CLOSE


@pytest.mark.parametrize(
    "options",
    [
        W8A8Options(smooth=False),
        W8A8Options(range_method="mse"),
        W8A8Options(range_method="max"),
        W8A8Options(gelu_shift=False),
    ],
    ids=str,
)
def test_every_option_gives_a_usable_plan(options: W8A8Options, tiny_checkpoint: Path, calibrated: Calibrated) -> None:
    model = _model(tiny_checkpoint)
    plan = plan_w8a8(model, calibrated(model), options)
    _assert_usable(plan)
    assert _logit_error(model, plan) < CLOSE
    assert plan.options.to_dict()["range_method"] == options.range_method


@pytest.mark.parametrize(
    "names",
    [
        ["correction.down.weight", "correction.down.bias"],
        ["layers.0.attn.v.weight", "layers.0.attn.v.bias"],
        ["layers.0.mlp.up.weight", "layers.0.mlp.up.bias"],
        ["layers.1.mlp_norm.weight", "layers.1.mlp_norm.bias"],
        ["layers.1.mlp_norm.weight"],
        ["lm_head.weight"],
    ],
    ids=lambda names: "+".join(names),
)
def test_zero_tensors_get_scale_one_and_stay_exact(
    names: list[str], make_checkpoint: Callable[..., Path], calibrated: Calibrated
) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[name].zero_()

    model = _model(make_checkpoint(edit=zero))
    plan = plan_w8a8(model, calibrated(model))
    _assert_usable(plan)
    for name in names:
        linear = name.removesuffix(".weight")
        if linear in plan.linears:
            assert not plan.linears[linear].weight.any()
            assert np.all(plan.linears[linear].weight_scale == 1)
    assert _logit_error(model, plan) < CLOSE


def test_zero_channels_get_scale_one(make_checkpoint: Callable[..., Path], calibrated: Calibrated) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.mlp.up.weight"][5] = 0
        tensors["layers.0.mlp.down.weight"][:, 7] = 0
        tensors["layers.0.attn.v.weight"][2] = tensors["layers.0.attn.v.bias"][2] = 0
        tensors["layers.0.attn_norm.weight"][4] = tensors["layers.0.attn_norm.bias"][4] = 0

    model = _model(make_checkpoint(edit=zero))
    plan = plan_w8a8(model, calibrated(model))
    _assert_usable(plan)
    assert plan.linears["layers.0.mlp.up"].weight_scale[5] == 1
    assert _logit_error(model, plan) < CLOSE


def test_an_input_that_is_one_value_everywhere_is_represented_exactly(
    make_checkpoint: Callable[..., Path], calibrated: Calibrated
) -> None:
    def constant(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.mlp.up.weight"].zero_()
        tensors["layers.0.mlp.up.bias"].fill_(1.5)

    model = _model(make_checkpoint(edit=constant))
    plan = plan_w8a8(model, calibrated(model))
    value = float(torch.nn.functional.gelu(torch.tensor(1.5)))
    down = plan.inputs["layers.0.mlp.down"]
    assert down.scale == 1
    assert down.shift == pytest.approx(value, rel=1e-6)
    assert _logit_error(model, plan) < CLOSE


def test_the_gelu_shift_is_folded_into_the_bias_exactly(tiny_checkpoint: Path, calibrated: Calibrated) -> None:
    model = _model(tiny_checkpoint)
    plan = plan_w8a8(model, calibrated(model))
    down, given = plan.linears["correction.down"], plan.inputs["correction.down"]
    assert down.bias is not None
    dequantized = down.weight * down.weight_scale.astype(np.float64)
    g = float(given.shift) + float(given.scale) * np.random.default_rng(0).integers(
        -127, 128, (5, dequantized.shape[0])
    )
    bias = model.get_parameter("correction.down.bias").numpy()
    np.testing.assert_allclose((g - given.shift) @ dequantized + down.bias, g @ dequantized + bias, atol=1e-5)
    assert given.shift > 0
    assert all(plan.inputs[name].shift == 0 for name in plan.inputs if not name.endswith("down"))


def test_a_tied_head_has_no_bias(make_checkpoint: Callable[..., Path], calibrated: Calibrated) -> None:
    model = _model(make_checkpoint(tie_word_embeddings=True))
    assert plan_w8a8(model, calibrated(model)).linears["lm_head"].bias is None


def test_what_does_not_fit_into_half_precision_is_refused_by_name(
    make_checkpoint: Callable[..., Path], calibrated: Calibrated
) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.mlp_norm.weight"][3] = 30000
        tensors["layers.1.mlp.up.weight"][:, 3] /= 30000

    model = _model(make_checkpoint(edit=enlarge))
    statistics = calibrated(model)
    with pytest.raises(
        UnsupportedError, match=r"(?s)layers.1.mlp.up.*layers.1.mlp_norm.weight: largest magnitude 30000"
    ):
        plan_w8a8(model, statistics, W8A8Options(smooth=False))
    assert _logit_error(model, plan_w8a8(model, statistics)) < CLOSE


def test_all_bad_options_are_reported_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)alpha.*range_method.*percentile"):
        W8A8Options(alpha=2, range_method="guess", percentile=10)


def test_columns_are_quantised_to_half_a_step() -> None:
    weight = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32) * np.logspace(-1, 3, 9, dtype=np.float32)
    levels, scale = quantize_columns(weight)
    assert np.all(np.abs(levels * scale - weight) <= scale * 0.5001)
    assert np.all(np.abs(levels).max(axis=0) == 127)


def test_tiny_columns_keep_a_scale_that_half_precision_holds() -> None:
    levels, scale = quantize_columns(np.full((4, 1), 1e-7, np.float32))
    assert scale[0] == SMALLEST_SCALE
    assert not levels.any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_shrink_from_max_to_percentile_and_stay_inside(symmetric: bool) -> None:
    values = np.random.default_rng(0).standard_t(3, 100_000).astype(np.float32)
    low, high = float(values.min()), float(values.max())

    def width(method: str, percentile: float = 99.99) -> float:
        a, b = value_range(values, low, high, method=method, percentile=percentile, symmetric=symmetric)
        assert not symmetric or a == -b
        return b - a

    assert width("max") > width("percentile") > width("percentile", 99.9) > 0
    assert width("max") > width("mse") > 0


def test_an_empty_range_has_scale_one() -> None:
    assert scale_from_range(2.0, 2.0) == 1
