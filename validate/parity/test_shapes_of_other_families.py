"""Tiny models of the shapes of other families: built for both targets of a CPU, they pass every level of a build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crt_export.parity.windows import BUILD_LEVELS
from crt_export.pipeline import BuildOptions, build

TARGETS = ("ort-cpu-fp32", "ort-cpu-int8")
SHAPE: dict[str, Any] = {
    "model_type": "transformer", "norm": "rms", "gated_mlp": True, "biases": False, "rope_layout": "half",
    "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    **SHAPE, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "activation": "silu",
}  # fmt: skip
GEMMA = {
    **SHAPE, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
    "norm_placement": "sandwich", "qk_norm": "head", "activation": "gelu_tanh",
    "rope_theta": None, "rope_frequencies": [[0.5**pair for pair in range(8)], [0.25**pair for pair in range(8)]],
    "num_hidden_layers": 3, "layer_attention": [[12, 1], [None, 0]],
}  # fmt: skip


def _quiet_branches(tensors: dict[str, torch.Tensor]) -> None:
    """Norms behind a branch that add a fifth of their size to the stream.

    At full size, random branches are all that the logits are made of, and 8 bits round each of their products:
    rounding the weights alone is then 1.5 % of the logits, where the limits are those of trained models.
    """
    for name, tensor in tensors.items():
        if name.endswith("post_norm.weight"):
            tensor *= 0.2


@pytest.mark.parametrize("shape", [pytest.param(LLAMA, id="Llama"), pytest.param(GEMMA, id="Gemma")])
def test_a_build_passes_every_level(
    make_checkpoint: Callable[..., Path], heldout_text: Path, tmp_path: Path, shape: dict[str, Any]
) -> None:
    """Grouped queries, gated MLPs, norms of every place, heads wider than their share, rotations that differ."""
    options = BuildOptions(
        checkpoint=make_checkpoint(edit=_quiet_branches, **shape),
        output=tmp_path / "bundle",
        targets=TARGETS,
        text=heldout_text,
        capacity=64,
        short_reason="random weights",
    )
    report = build(options).report
    assert report is not None
    assert report.passed, report.failures
    judged = {(result.target, result.level) for result in report.levels if result.passed}
    assert judged >= {(target, level) for target in TARGETS for level in BUILD_LEVELS}
