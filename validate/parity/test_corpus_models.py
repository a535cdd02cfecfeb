"""The gates of the corpus level on sound exports of other models than the demo: none may fail.

A random model predicts no real text better than a uniform guess, so three gates would not apply to it. It does predict
what it wrote itself: here every model is validated on its own samples, with logits scaled up to the demo's spread.
Logs the figures that the reasons in ``validate/tolerances.toml`` name (``pytest --log-cli-level=INFO``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from loose_step import DTYPES, compare_step

from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.graph.export import export_graph
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity import Comparison, ParityOptions
from crt_export.parity.reference import STEP, Reference
from crt_export.parity.windows import windows_from_text
from crt_export.quantize.calibration import calibrate, calibration_windows
from crt_export.quantize.plan import W8A8Plan, plan_w8a8, quantize_linears
from crt_export.quantize.w8 import quantize_w8
from crt_export.quantize.w8a8 import quantize_w8a8
from crt_export.text import TokenText

_log = logging.getLogger(__name__)
CALIBRATION = 4096
WIDE: dict[str, Any] = {"max_position_embeddings": 256, "training_sequence_length": 256}
MODELS: dict[str, dict[str, Any]] = {
    "bytes": {**WIDE},
    "loud": {**WIDE, "scale": 20},
    "three tokens": {**WIDE, "vocab_size": 3, "tokenizer": "none"},
    "twelve tokens": {**WIDE, "vocab_size": 12, "tokenizer": "none"},
    "plain transformer": {
        "model_type": "transformer", "vocab_size": 1000, "tokenizer": "none", "max_position_embeddings": 48,
        "training_sequence_length": None,
    },
    "tied": {
        **WIDE, "vocab_size": 2000, "tokenizer": "none", "num_hidden_layers": 3, "tie_word_embeddings": True,
        "scale": 2,
    },
    "32,000 tokens": {**WIDE, "vocab_size": 32000, "tokenizer": "none", "hidden_size": 64, "num_hidden_layers": 1},
}  # fmt: skip
#: With three tokens, and with so many that 4,096 hardly repeat, a model does not write what calibration takes for text.
LEFT_OUT = {
    "three tokens": ("w8a8",),
    "32,000 tokens": ("fp32", "w8a8"),
    # Logits of standard deviation 10: 8 bits change the likelihood by more than delta_nll allows.
    "loud": ("w8", "w8a8"),
}
CASES = [(name, precision) for name in MODELS for precision in DTYPES if precision not in LEFT_OUT.get(name, ())]


@torch.no_grad()
def _written(model: LanguageModel, count: int, length: int) -> np.ndarray:
    """What a model writes by sampling, int64 [count * length]: ``count`` texts one behind the other."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (count, 1), generator=generator)
    state = model.start(count)
    for _ in range(length - 1):
        h, state = model.step(ids[:, -1:], state)
        ids = torch.cat([ids, torch.multinomial(model.head(h)[:, -1].softmax(-1), 1, generator=generator)], 1)
    return ids.flatten().numpy()


def _step_graph(
    checkpoint: Checkpoint, precision: str, calibration: np.ndarray, length: int
) -> tuple[ir.Model, W8A8Plan | None]:
    graph, plan = export_graph(model_from_checkpoint(checkpoint, DTYPES[precision]), STEP), None
    if precision == "w8":
        quantize_w8(graph)
    elif precision == "w8a8":
        model = model_from_checkpoint(checkpoint)
        statistics = calibrate(model, calibration_windows(calibration, seq=min(128, length)), unroll=2)
        plan = plan_w8a8(model, statistics)
        quantize_w8a8(graph, quantize_linears(model, plan))
    return graph, plan


def _compared(checkpoint: Checkpoint, precision: str, folder: Path) -> Comparison:
    model = model_from_checkpoint(checkpoint)
    length = min(256, checkpoint.config.max_position_embeddings)
    ids = _written(model, -(-2 * (CALIBRATION + length) // length), length)
    text = TokenText(ids=ids[-(-CALIBRATION // length) * length :], source="its own samples")
    windows = windows_from_text(text, ParityOptions(), longest=length, longest_reason="test")
    graph, plan = _step_graph(checkpoint, precision, ids[:CALIBRATION], length)
    return compare_step(graph, precision, Reference(model, windows, batch=windows.count), folder, unroll=2, plan=plan)


@pytest.mark.evidence
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_sound_export_of_a_random_model_passes_every_gate(
    name: str, precision: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    changes = dict(MODELS[name])
    scale = changes.pop("scale", 6)

    def louder(tensors: dict[str, torch.Tensor]) -> None:
        for weight in ("lm_head.weight", "lm_head.bias") if "lm_head.weight" in tensors else ("embed.weight",):
            tensors[weight] *= scale

    found = _compared(load_checkpoint(make_checkpoint(edit=louder, **changes)), precision, tmp_path)
    _log.info("%s, %s: %s", name, precision, {check.name: check.value for check in found.checks})
    assert found.better_than_chance, "its own samples are predicted worse than by a uniform guess"
    ungated = {check.name for check in found.checks if check.passed is None}
    assert ungated <= {"step: max_abs_logit_error", "step: top10_overlap"}
    assert found.passed, found.failures
