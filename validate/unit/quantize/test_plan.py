from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from crt_export.checkpoint import load_checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import BundleError, UnsupportedError
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.quantize.calibration import ActivationStatistics
from crt_export.quantize.emulation import emulate_w8a8
from crt_export.quantize.linears import linear_inputs, linear_names
from crt_export.quantize.plan import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    QuantizedInput,
    QuantizedLinears,
    W8A8Plan,
    plan_w8a8,
    quantize_columns,
    quantize_linears,
    read_plan,
    scale_from_range,
    value_range,
)

Calibrated = Callable[[LanguageModel], ActivationStatistics]


#: Root mean square error of the logits, relative to their spread: what 8 bits cost these untrained models.
CLOSE = 0.03


def _model(path: Path) -> LanguageModel:
    return model_from_checkpoint(load_checkpoint(path))


def _logit_error(model: LanguageModel, quantized: QuantizedLinears) -> float:
    ids = torch.arange(97, 121)[None]
    exact = model.head(model.sequential(ids)[0].hidden)
    found = emulate_w8a8(model, quantized)
    return float((found.head(found.sequential(ids)[0].hidden) - exact).square().mean().sqrt() / exact.std())


def _quantized(model: LanguageModel, calibrated: Calibrated) -> QuantizedLinears:
    return quantize_linears(model, plan_w8a8(model, calibrated(model)))


def _assert_usable(quantized: QuantizedLinears) -> None:
    linears = quantized.linears.values()
    scales = [q.scale for q in quantized.plan.inputs.values()] + [s for q in linears for s in q.weight_scale]
    assert all(SMALLEST_SCALE <= scale <= LARGEST_SCALE for scale in scales)
    assert all(np.isfinite(q.bias).all() for q in linears if q.bias is not None)
    assert all(np.abs(q.weight).max() <= 127 for q in linears)


def test_a_plan_covers_every_linear_and_stays_close_to_the_model(tiny_checkpoint: Path, calibrated: Calibrated) -> None:
    model = _model(tiny_checkpoint)
    quantized = _quantized(model, calibrated)
    assert set(quantized.linears) == set(linear_names(model.config))
    norms = {group.norm for group in linear_inputs(model.config)} - {None}
    assert set(quantized.norms) == {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}
    _assert_usable(quantized)
    assert _logit_error(model, quantized) < CLOSE


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
    quantized = _quantized(model, calibrated)
    _assert_usable(quantized)
    for name in names:
        linear = name.removesuffix(".weight")
        if linear in quantized.linears:
            assert not quantized.linears[linear].weight.any()
            assert np.all(quantized.linears[linear].weight_scale == 1)
    assert _logit_error(model, quantized) < CLOSE


def test_zero_channels_get_scale_one(make_checkpoint: Callable[..., Path], calibrated: Calibrated) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.mlp.up.weight"][5] = 0
        tensors["layers.0.mlp.down.weight"][:, 7] = 0
        tensors["layers.0.attn.v.weight"][2] = tensors["layers.0.attn.v.bias"][2] = 0
        tensors["layers.0.attn_norm.weight"][4] = tensors["layers.0.attn_norm.bias"][4] = 0

    model = _model(make_checkpoint(edit=zero))
    quantized = _quantized(model, calibrated)
    _assert_usable(quantized)
    assert quantized.linears["layers.0.mlp.up"].weight_scale[5] == 1
    assert _logit_error(model, quantized) < CLOSE


def test_an_input_that_is_one_value_everywhere_is_represented_exactly(
    make_checkpoint: Callable[..., Path], calibrated: Calibrated
) -> None:
    def constant(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.mlp.up.weight"].zero_()
        tensors["layers.0.mlp.up.bias"].fill_(1.5)

    model = _model(make_checkpoint(edit=constant))
    quantized = _quantized(model, calibrated)
    value = float(torch.nn.functional.gelu(torch.tensor(1.5)))
    down = quantized.plan.inputs["layers.0.mlp.down"]
    assert down.scale == 1
    assert down.shift == pytest.approx(value, rel=1e-6)
    assert _logit_error(model, quantized) < CLOSE


def test_the_gelu_shift_is_folded_into_the_bias_exactly(tiny_checkpoint: Path, calibrated: Calibrated) -> None:
    model = _model(tiny_checkpoint)
    quantized = _quantized(model, calibrated)
    down, given = quantized.linears["correction.down"], quantized.plan.inputs["correction.down"]
    assert down.bias is not None
    dequantized = down.weight * down.weight_scale.astype(np.float64)
    g = float(given.shift) + float(given.scale) * np.random.default_rng(0).integers(
        -127, 128, (5, dequantized.shape[0])
    )
    bias = model.get_parameter("correction.down.bias").numpy()
    np.testing.assert_allclose((g - given.shift) @ dequantized + down.bias, g @ dequantized + bias, atol=1e-5)
    assert given.shift > 0
    assert all(quantized.plan.inputs[name].shift == 0 for name in quantized.plan.inputs if not name.endswith("down"))


def test_a_tied_head_has_no_bias(make_checkpoint: Callable[..., Path], calibrated: Calibrated) -> None:
    model = _model(make_checkpoint(tie_word_embeddings=True))
    assert _quantized(model, calibrated).linears["lm_head"].bias is None


def test_what_does_not_fit_into_half_precision_is_refused_by_name(
    make_checkpoint: Callable[..., Path], calibrated: Calibrated
) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.mlp_norm.weight"][3] = 30000  # folded into the weights, as nothing behind a GELU can be
        tensors["layers.1.mlp.up.weight"][:, 3] /= 30000
        tensors["layers.1.mlp.down.weight"][:, 5] = 0

    model = _model(make_checkpoint(edit=enlarge))
    assert _logit_error(model, _quantized(model, calibrated)) < CLOSE
    model.get_parameter("layers.1.mlp.up.bias").data[5] = 30000
    with pytest.raises(UnsupportedError, match=r"(?s)below 16376.*input of layers.1.mlp.down: largest magnitude 3000"):
        plan_w8a8(model, calibrated(model))


def _plan(config: ModelConfig) -> W8A8Plan:
    generator = np.random.default_rng(0)
    return W8A8Plan(
        inputs={
            group.name: QuantizedInput(
                scale=np.float32(0.1 * (i + 1)),
                shift=np.float32(i / 3),
                factor=np.exp2(generator.integers(-3, 4, _channels(group.name, config))).astype(np.float32),
            )
            for i, group in enumerate(linear_inputs(config))
        }
    )


def _channels(name: str, config: Any) -> int:
    if not name.endswith("down"):
        return config.hidden_size
    return config.correction_intermediate_size or 0 if name.startswith("correction") else config.intermediate_size


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=str)
def test_a_plan_comes_back_bit_for_bit(changes: dict, tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> None:
    config = tiny_config(**changes)
    plan = _plan(config)
    (tmp_path / "plan").write_bytes(plan.to_bytes())
    found = read_plan(tmp_path / "plan", config)
    assert found.sha256 == plan.sha256
    assert list(found.inputs) == list(plan.inputs)
    for name, expected in plan.inputs.items():
        assert (found.inputs[name].scale, found.inputs[name].shift) == (expected.scale, expected.shift)
        np.testing.assert_array_equal(found.inputs[name].factor, expected.factor)


def test_a_file_that_is_no_plan_of_this_model_is_refused_with_all_that_is_wrong(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    config, path = tiny_config(), tmp_path / "plan"
    with pytest.raises(BundleError, match="expected the plan of w8a8"):
        read_plan(path, config)
    path.write_bytes(b"no plan")
    with pytest.raises(BundleError, match="expected the plan of w8a8"):
        read_plan(path, config)
    tensors = load(_plan(config).to_bytes())
    del tensors["layers.0.attn.o.input_shift"]
    tensors["layers.9.attn.o.factor"] = np.ones(4, np.float32)
    tensors["lm_head.factor"] = tensors["lm_head.factor"][1:]
    tensors["lm_head.input_scale"] = np.zeros((), np.float32)
    tensors["lm_head.input_shift"] = np.asarray(np.nan, np.float32)
    path.write_bytes(save(tensors))
    with pytest.raises(BundleError) as caught:
        read_plan(path, config)
    for sentence in (
        "layers.0.attn.o.input_shift is missing",
        "layers.9.attn.o.factor belongs to no linear of the model",
        f"lm_head.factor is float32 [{config.hidden_size - 1}], expected float32 [{config.hidden_size}]",
        "lm_head.input_scale must be finite and above 0",
        "lm_head.input_shift must be finite",
    ):
        assert sentence in str(caught.value)


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
def test_a_range_leaves_the_outermost_values_out_and_no_others(symmetric: bool) -> None:
    values = np.random.default_rng(0).standard_t(3, 100_000).astype(np.float32)
    low, high = value_range(values, symmetric=symmetric)
    assert not symmetric or low == -high
    outside = int(((values < low) | (values > high)).sum())
    assert 5 <= outside <= 15, "0.01 per cent of them"
    assert values.min() < low < high < values.max()


def test_an_empty_range_has_scale_one() -> None:
    assert scale_from_range(2.0, 2.0) == 1
