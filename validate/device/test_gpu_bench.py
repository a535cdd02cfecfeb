"""A short run of the GPU benchmark: CUDA captures the step, and the launched graph decodes as the eager step does."""

from __future__ import annotations

from collections.abc import Callable

import gpu_bench
import pytest
import torch
from gpu_candidates import CapturedStep, Grid
from static_step import StaticStep, random_model

from crt_export.models.presets import PRESETS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no NVIDIA GPU on this machine")


def test_a_captured_step_decodes_as_the_eager_one() -> None:
    """The same graph at position after position: the position is read on the device."""
    model = random_model(PRESETS["tiny"], dtype=torch.float32, device="cuda")
    eager = StaticStep(model, batch=2, context=16, masked=False)
    buffers = StaticStep(model, batch=2, context=16, masked=True)
    captured = CapturedStep(buffers)
    for step in (eager, buffers):
        step.ids.fill_(65)
        step.state.zero_()
    for position in range(16):
        eager.seek(position)
        captured.seek(position)
        eager()
        captured()
        torch.testing.assert_close(buffers.logits, eager.logits, atol=1e-3, rtol=1e-3)
        assert torch.equal(buffers.ids, eager.ids)


def test_the_published_sizes_are_measured(note: Callable[..., None]) -> None:
    grid = Grid(dtypes=("bf16",), backends=("pytorch-eager", "pytorch-cuda-graph"), batches=(1,), contexts=(128,))
    entries = gpu_bench.measure(grid)
    note(entries=entries)
    assert {entry["status"] for entry in entries} == {"measured"}, entries
