"""The accuracy of W8A8 on the trained demo, with and without outlier channels, in ONNX Runtime against PyTorch FP32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from crt_export.checkpoint import load_checkpoint
from crt_export.graph.export import export_graph
from crt_export.model import Model, model_from_checkpoint
from crt_export.quantize import W8A8Options, calibrate, calibration_windows, plan_w8a8, quantize_w8a8

#: nat per token; a tenth of what x10 outliers cost without folding, and what validate/tolerances.toml allows W8A8.
GATE = 0.005
MEAN_KL_GATE = 0.001
TOP1_GATE = 0.975


@pytest.fixture(scope="module")
def step_graph(demo_checkpoint: Path) -> bytes:
    """The demo's FP16 step; outliers change nothing in it that the plan does not replace."""
    model = model_from_checkpoint(load_checkpoint(demo_checkpoint), torch.float16)
    return ir.to_proto(export_graph(model, "step")).SerializeToString()


@pytest.fixture(scope="module")
def heldout(heldout_text: Path) -> np.ndarray:
    tokens = np.frombuffer(heldout_text.read_bytes(), np.uint8).astype(np.int64)
    return calibration_windows(tokens, seq=64)


def _log_probabilities(logits: np.ndarray) -> torch.Tensor:
    return torch.log_softmax(torch.from_numpy(logits), -1)


def _measure(reference: torch.Tensor, found: torch.Tensor, ids: np.ndarray) -> tuple[float, float, float]:
    """Change of the mean negative log-likelihood, mean KL divergence and top-1 agreement."""
    target = torch.from_numpy(ids[:, 1:, None])
    change = (reference - found)[:, :-1].gather(-1, target).mean()
    divergence = (reference.exp() * (reference - found)).sum(-1).mean()
    agreement = (reference.argmax(-1) == found.argmax(-1)).float().mean()
    return float(change), float(divergence), float(agreement)


@pytest.mark.parametrize("factor", [1, 10, 50])
def test_outlier_channels_stay_within_the_gate_of_the_normal_model(
    factor: int,
    demo_checkpoint: Path,
    step_graph: bytes,
    heldout: np.ndarray,
    text_tokens: np.ndarray,
    with_outliers: Callable[[Model, float], Model],
    step_chain: Callable[[ir.Model, Model, np.ndarray], np.ndarray],
) -> None:
    model = model_from_checkpoint(load_checkpoint(demo_checkpoint))
    reference = _log_probabilities(model.head(model.sequential(torch.from_numpy(heldout))[0]).numpy())
    model = with_outliers(model, factor)
    statistics = calibrate(model, calibration_windows(text_tokens, seq=64), unroll=4)
    found = {}
    for smooth in (True, False) if factor > 1 else (True,):
        graph = ir.from_proto(onnx.load_model_from_string(step_graph))
        quantize_w8a8(graph, plan_w8a8(model, statistics, W8A8Options(smooth=smooth)))
        found[smooth] = _measure(reference, _log_probabilities(step_chain(graph, model, heldout)), heldout)
    change, divergence, agreement = found[True]
    assert abs(change) < GATE
    assert divergence < MEAN_KL_GATE
    assert agreement > TOP1_GATE
    if factor > 1:
        assert found[False][1] > MEAN_KL_GATE, "without folding this checkpoint shows nothing: it is no test"
