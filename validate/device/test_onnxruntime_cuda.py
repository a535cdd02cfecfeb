"""ONNX Runtime on an NVIDIA GPU against PyTorch FP32: the session an application opens, caches on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crt_export import load_bundle
from crt_export.checkpoint import load_checkpoint
from crt_export.engine.ort import import_onnxruntime
from crt_export.environment import target_status
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity import load_tolerances
from crt_export.pipeline import BuildOptions, build
from crt_export.profile import load_profile

TARGET = "ort-cuda-fp16"
SIZES: dict[Any, Any] = {"batch": 1, "capacity": 64}
STATUS = target_status(load_profile(TARGET))
pytestmark = pytest.mark.skipif(STATUS.status != "run", reason=f"{TARGET} needs {', '.join(STATUS.needs)}")


def test_prefill_and_steps_agree_with_pytorch(demo_checkpoint: Path, heldout_text: Path, tmp_path: Path) -> None:
    """Logits after a real prompt, continued by real text, in FP16 arithmetic, within the gate of fp16."""
    build(BuildOptions(checkpoint=demo_checkpoint, output=tmp_path / "demo", targets=(TARGET,), text=heldout_text))
    ids = np.frombuffer(heldout_text.read_bytes()[-192:], np.uint8).astype(np.int64)
    model = model_from_checkpoint(load_checkpoint(demo_checkpoint))
    prompt, state, _ = model.unroll(torch.from_numpy(ids[None, :128]), model.carried.passes)
    rest, _ = model.sequential(torch.from_numpy(ids[None, 128:]), state)
    expected = model.head(torch.cat([prompt.hidden[:, -1:], rest.hidden], dim=1))[0].numpy()
    with load_bundle(tmp_path / "demo") as bundle:
        session = bundle.session(TARGET)
        found = [session.prefill([ids[:128].tolist()]), *(session.step([int(token)]) for token in ids[128:])]
    relative = np.abs(np.concatenate(found) - expected).mean() / expected.std(axis=-1).mean()
    assert relative <= load_tolerances().precisions["fp16"].relative_logit_error


def test_io_binding_feeds_greedy_steps_without_a_host_copy(
    demo_checkpoint: Path, heldout_text: Path, tmp_path: Path, note: Callable[..., None]
) -> None:
    """advance() reads the next token from where the engine left it; the tokens are those of steps fed by hand."""
    build(BuildOptions(checkpoint=demo_checkpoint, output=tmp_path / "demo", targets=(TARGET,), text=heldout_text))
    prompt = [list(heldout_text.read_bytes()[-64:])]
    with load_bundle(tmp_path / "demo") as bundle:
        greedy, by_hand = bundle.session(TARGET), bundle.session(TARGET)
        greedy.prefill(prompt)
        logits = by_hand.prefill(prompt)
        begin = time.perf_counter()
        tokens = []
        for _ in range(64):
            tokens.append(int(greedy.next_tokens[0]))
            greedy.advance([tokens[-1]])
        seconds = (time.perf_counter() - begin) / 64
        expected = []
        for _ in range(64):
            expected.append(int(logits[0].argmax()))
            logits = by_hand.step([expected[-1]])
    note(target=TARGET, microseconds_per_greedy_token=round(seconds * 1e6, 1))
    assert tokens == expected


def test_what_onnxruntime_says_to_capturing_the_step_into_a_cuda_graph(
    demo_checkpoint: Path, heldout_text: Path, tmp_path: Path, note: Callable[..., None]
) -> None:
    """With every tensor bound; a graph that CUDA cannot run whole is refused, and the words are kept."""
    build(BuildOptions(checkpoint=demo_checkpoint, output=tmp_path / "demo", targets=(TARGET,), text=heldout_text))
    ort = import_onnxruntime("cuda")
    with load_bundle(tmp_path / "demo") as bundle:
        path = bundle.files.graph(bundle.target(TARGET).graphs["step"])
    runs, outcome = [], "captured"
    try:
        captured = ort.InferenceSession(str(path), providers=[("CUDAExecutionProvider", {"enable_cuda_graph": "1"})])
        binding, values = captured.io_binding(), {}
        for node in captured.get_inputs():
            shape = [SIZES.get(dim, dim) for dim in node.shape]
            dtype = {"tensor(int64)": np.int64, "tensor(float16)": np.float16}.get(node.type, np.float32)
            values[node.name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), "cuda", 0)
            binding.bind_ortvalue_input(node.name, values[node.name])
        for node in captured.get_outputs():
            past = node.name.replace("present_", "past_")
            if past in values:
                binding.bind_ortvalue_output(node.name, values[past])
            else:
                shape = [SIZES.get(dim, dim) for dim in node.shape]
                dtype = {"tensor(int64)": np.int64}.get(node.type, np.float32)
                values[node.name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), "cuda", 0)
                binding.bind_ortvalue_output(node.name, values[node.name])
        for token in (84, 104, 84):
            values["input_ids"].update_inplace(np.full((1, 1), token, np.int64))
            captured.run_with_iobinding(binding)
            runs.append(values["logits"].numpy().copy())
    except Exception as error:  # ONNX Runtime raises RuntimeError or one of a dozen classes of its own
        outcome = str(error)
    note(target=TARGET, outcome=outcome, runs=len(runs))
    if outcome == "captured":
        np.testing.assert_allclose(runs[2], runs[0], rtol=0, atol=1e-2)
        assert np.abs(runs[1] - runs[0]).max() > 0, "a launched graph must read its inputs anew"
