"""W8 and W8A8 of the trained demo, with and without outlier channels, under the gates that a build must pass."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from crt_export.checkpoint import load_checkpoint
from crt_export.graph.export import GraphExporter
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity import Comparison, ParityOptions, load_tolerances
from crt_export.parity.reference import Reference
from crt_export.parity.windows import windows_from_text
from crt_export.quantize import smoothing
from crt_export.quantize.calibration import calibrate, calibration_windows
from crt_export.quantize.plan import W8A8Plan, plan_w8a8, quantize_linears
from crt_export.quantize.w8 import quantize_w8
from crt_export.quantize.w8a8 import quantize_w8a8
from crt_export.text import TokenText

UNROLL = 4
Check = Callable[..., Comparison]


@pytest.fixture(scope="module")
def exporters(demo_checkpoint: Path, shared_traces: None) -> dict[str, GraphExporter]:
    """The demo's step per precision, not yet quantised; its linears and scales are also those of prefill."""
    checkpoint = load_checkpoint(demo_checkpoint)
    dtypes = {"w8": torch.float32, "w8a8": torch.float16}
    return {name: GraphExporter(model_from_checkpoint(checkpoint, dtype)) for name, dtype in dtypes.items()}


@pytest.fixture(scope="module")
def reference(demo_checkpoint: Path, heldout_text: Path) -> Reference:
    """The demo as it was trained, in FP32, on 4,096 tokens: outlier channels must change nothing."""
    ids = np.frombuffer(heldout_text.read_bytes(), np.uint8).astype(np.int64)
    windows = windows_from_text(
        TokenText(ids=ids, source="heldout.txt"), ParityOptions(), longest=1024, longest_reason=""
    )
    return Reference(model_from_checkpoint(load_checkpoint(demo_checkpoint)), windows, batch=windows.count)


@pytest.fixture
def check(exporters: dict[str, GraphExporter], reference: Reference, tmp_path: Path) -> Check:
    """``check(precision, quantize, plan)``: quantise the step and compare its chain as a build does."""

    def run(precision: str, quantize: Callable[[ir.Model], object], plan: W8A8Plan | None = None) -> Comparison:
        graph = exporters[precision].graph("step")
        quantize(graph)
        compare_step = importlib.import_module("loose_step").compare_step
        return compare_step(graph, precision, reference, tmp_path, unroll=UNROLL, plan=plan)

    return run


def _set_weights(graph: ir.Model, model: LanguageModel) -> None:
    """Give an FP32 graph the weights of another model of the same shapes."""
    weights = dict(model.named_parameters())
    for name, value in graph.graph.initializers.items():
        if name in weights:
            value.const_value = ir.tensor(weights[name].detach().numpy(), name=name)


def _require_within_the_gates(row: Comparison) -> None:
    """All of the 95 % interval, top-1 and logit error: what ``compare`` judges, and that it did."""
    assert row.passed, row.failures
    assert row.tokens == 4096
    assert row.better_than_chance, "the likelihood was not gated"
    ends = row.interval("delta_nll")
    assert ends is not None
    limits = load_tolerances().precisions[row.precision]
    assert -limits.delta_nll <= ends[0] <= ends[1] <= limits.delta_nll


def _without_smoothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "balancing_exponents", lambda activation, _: np.zeros(activation.shape))


@pytest.mark.parametrize("factor", [1, 10, 50])
def test_w8_with_outlier_channels_stays_within_the_gates(
    factor: int,
    demo_checkpoint: Path,
    check: Check,
    with_outliers: Callable[[LanguageModel, float], LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_outliers(model_from_checkpoint(load_checkpoint(demo_checkpoint)), factor)

    def quantize(graph: ir.Model) -> None:
        _set_weights(graph, model)
        quantize_w8(graph)

    _require_within_the_gates(check("w8", quantize))
    if factor > 10:
        _without_smoothing(monkeypatch)
        rough = check("w8", quantize)
        assert rough.passed is False, "without smoothing this checkpoint shows nothing: it is no test"


@pytest.mark.parametrize("factor", [1, 10, 50])
def test_w8a8_with_outlier_channels_stays_within_the_gates(
    factor: int,
    demo_checkpoint: Path,
    check: Check,
    text_tokens: np.ndarray,
    with_outliers: Callable[[LanguageModel, float], LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_outliers(model_from_checkpoint(load_checkpoint(demo_checkpoint)), factor)
    statistics = calibrate(model, calibration_windows(text_tokens, seq=64), unroll=UNROLL)
    plan = plan_w8a8(model, statistics)
    # The plan replaces every weight that outliers change.
    _require_within_the_gates(check("w8a8", lambda graph: quantize_w8a8(graph, quantize_linears(model, plan)), plan))
    if factor > 1:
        _without_smoothing(monkeypatch)
        plain = plan_w8a8(model, statistics)
        rough = check("w8a8", lambda graph: quantize_w8a8(graph, quantize_linears(model, plain)), plain)
        assert rough.passed is False, "without folding this checkpoint shows nothing: it is no test"
