"""TensorRT and TensorRT-RTX sessions on a GPU against ONNX Runtime on the CPU, which runs the very same graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crt_export.bundle import open_bundle
from crt_export.engine.tensorrt.api import Log, create_runtime, logger_from_log, plan_validity_rtx
from crt_export.engine.tensorrt.device import CudaDevice
from crt_export.engine.tensorrt.engine import Machine
from crt_export.environment import gpus, run_obstacles, target_status
from crt_export.errors import CrtExportError
from crt_export.machine import Gpu
from crt_export.parity import load_tolerances
from crt_export.pipeline import BuildOptions, build
from crt_export.profile import load_profile
from crt_export.runtime import Bundle, load_bundle
from crt_export.runtime.opening import compiled_engine

Note = Callable[..., None]
REFERENCE = "ort-cpu-fp32"
STEPS = 64


def profile_for_this_gpu(runtime: str, folder: Path) -> str:
    """A target of this runtime for the GPU that is here; the tracked ones are for SM 8.0."""
    if not gpus():
        pytest.skip("this machine has no NVIDIA GPU")
    tracked = Path(__file__).resolve().parents[2] / "engines" / f"{runtime}-sm80-fp16.toml"
    capability = gpus()[0].compute_capability
    text = tracked.read_text().replace("compute_capability = 80", f"compute_capability = {capability}")
    path = folder / f"{runtime}-here-fp16.toml"
    path.write_text(text.replace(f'name = "{runtime}-sm80-fp16"', f'name = "{runtime}-here-fp16"'))
    return str(path)


@pytest.mark.parametrize("runtime", ["trt", "rtx"])
def test_prefill_and_greedy_steps_agree_with_the_cpu(
    runtime: str, demo_checkpoint: Path, heldout_text: Path, tmp_path: Path, note: Note
) -> None:
    target = profile_for_this_gpu(runtime, tmp_path)
    profile = load_profile(target)
    status = target_status(profile)
    if status.status != "run":
        pytest.skip(f"{profile.name} needs {', '.join(status.needs) or ', '.join(run_obstacles(profile, gpus()))}")
    options = BuildOptions(
        checkpoint=demo_checkpoint, output=tmp_path / "demo", targets=(target, REFERENCE), text=heldout_text
    )
    build(options)
    ids = np.frombuffer(heldout_text.read_bytes()[-192:], np.uint8).astype(np.int64)
    with load_bundle(tmp_path / "demo") as bundle:
        found, wanted = bundle.session(profile.name), bundle.session(REFERENCE)
        pairs = [(found.prefill([ids[:128]]), wanted.prefill([ids[:128]]))]
        pairs += [(found.step([int(token)]), wanted.step([int(token)])) for token in ids[128:]]
        here, there = (np.concatenate(side) for side in zip(*pairs, strict=True))
        relative = float(np.abs(here - there).mean() / there.std(axis=-1).mean())
        begin = time.perf_counter()
        for _ in range(STEPS):
            found.advance(found.next_tokens.tolist())
        seconds = (time.perf_counter() - begin) / STEPS
    note(target=profile.name, relative_logit_error=relative, microseconds_per_greedy_token=round(seconds * 1e6, 1))
    assert relative <= load_tolerances().precisions["fp16"].relative_logit_error


def test_what_tensorrt_rtx_says_to_an_engine_for_sm_80(
    demo_checkpoint: Path, heldout_text: Path, tmp_path: Path, note: Note
) -> None:
    """Tried once on whatever GPU is here, with the check of the architecture left out; either answer is a result."""
    if not gpus():
        pytest.skip("this machine has no NVIDIA GPU")
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    name = "rtx-sm80-fp16"
    build(
        BuildOptions(checkpoint=demo_checkpoint, output=tmp_path / "demo", targets=(name, REFERENCE), text=heldout_text)
    )
    files = open_bundle(tmp_path / "demo")
    log = Log()
    logger = logger_from_log(rtx, log)
    runtime = create_runtime(rtx, logger, version_compatible=False)
    plan = files.file(f"engines/{name}/step.engine").read_bytes()
    verdict = plan_validity_rtx(runtime, plan)
    machine = Machine(api=rtx, device=CudaDevice(), gpu=Gpu(name="pretended", compute_capability=80))
    outcome = "ran"
    difference = None
    with Bundle(files, lambda f, t, c, n: compiled_engine(f, t, c, machine)) as bundle:
        try:
            logits = bundle.session(name).prefill([[84, 104, 101]])
        except CrtExportError as error:
            outcome = str(error)
        else:
            with load_bundle(tmp_path / "demo") as reference:
                difference = float(np.abs(logits - reference.session(REFERENCE).prefill([[84, 104, 101]])).max())
    note(validity=verdict, log=log.take_errors(), outcome=outcome, largest_difference=difference, gpu=gpus()[0].name)
    assert outcome
