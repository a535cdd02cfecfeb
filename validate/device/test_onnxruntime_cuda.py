"""ONNX Runtime on an NVIDIA GPU against PyTorch FP32: the session an application opens, caches on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from crt_export import load_bundle
from crt_export.checkpoint import load_checkpoint
from crt_export.environment import target_status
from crt_export.model import model_from_checkpoint
from crt_export.parity import load_tolerances
from crt_export.pipeline import BuildOptions, build
from crt_export.profile import load_profile

TARGET = "ort-cuda-fp16"
STATUS = target_status(load_profile(TARGET))
pytestmark = pytest.mark.skipif(STATUS.status != "run", reason=f"{TARGET} needs {', '.join(STATUS.needs)}")


def test_prefill_and_steps_agree_with_pytorch(demo_checkpoint: Path, heldout_text: Path, tmp_path: Path) -> None:
    """Logits after a real prompt, continued by real text, in FP16 arithmetic, within the gate of fp16."""
    build(BuildOptions(checkpoint=demo_checkpoint, output=tmp_path / "demo", targets=(TARGET,), text=heldout_text))
    ids = np.frombuffer(heldout_text.read_bytes()[-192:], np.uint8).astype(np.int64)
    model = model_from_checkpoint(load_checkpoint(demo_checkpoint))
    h, carry, _ = model.unroll(torch.from_numpy(ids[None, :128]), model.config.unroll_steps)
    rest, _ = model.sequential(torch.from_numpy(ids[None, 128:]), carry)
    expected = model.head(torch.cat([h[:, -1:], rest], dim=1))[0].numpy()
    with load_bundle(tmp_path / "demo") as bundle:
        session = bundle.session(TARGET)
        found = [session.prefill([ids[:128].tolist()]), *(session.step([int(token)]) for token in ids[128:])]
    relative = np.abs(np.concatenate(found) - expected).mean() / expected.std(axis=-1).mean()
    assert relative <= load_tolerances().precisions["fp16"].relative_logit_error
