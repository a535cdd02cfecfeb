"""Everything that can go wrong with a TensorRT session: refused before it starts, or an error that poisons it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.bundle import MANIFEST_NAME
from crt_export.bundle.manifest import sealed
from crt_export.errors import BundleError, ContractError, InputError, MissingDependencyError
from crt_export.machine import Gpu
from crt_export.runtime import Bundle, load_bundle

Open = Callable[..., Bundle]
PROMPT = [40, 41, 42, 43, 44]
ENGINE = "engines/recorded/step.engine"
SIDECAR = "engines/recorded/step.json"


@pytest.fixture
def copied(recorded_path: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be changed."""
    return Path(shutil.copytree(recorded_path, tmp_path / "bundle"))


def change(bundle: Path, name: str, content: bytes) -> None:
    """Replace a file of a bundle as a build would have written it, hash included."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / MANIFEST_NAME).write_text(json.dumps(sealed(manifest)))


def change_sidecar(bundle: Path, **changes: Any) -> None:
    values = json.loads((bundle / SIDECAR).read_text())
    change(bundle, SIDECAR, json.dumps({**values, **changes}).encode())


def refusal(error: type[Exception], bundle: Path, open_recorded: Open, recording: Any, **options: Any) -> str:
    """What opening a session says; the engine must not have been deserialised."""
    recording.api.mutate = lambda values: pytest.fail("deserialised before the sidecar was checked")
    with open_recorded(bundle, recording, **options) as opened, pytest.raises(error) as caught:
        opened.session("recorded")
    return str(caught.value)


# --- before the engine is deserialised ------------------------------------------------------------------------------
def test_another_version_of_the_runtime(copied: Path, open_recorded: Open, recording: Any) -> None:
    change_sidecar(copied, runtime_version="1.6.0.5")
    text = refusal(MissingDependencyError, copied, open_recorded, recording)
    assert "built with tensorrt-rtx 1.6.0.5, 1.7.1.116 is installed: pip install 'tensorrt-rtx==1.6.0.5'" in text


@pytest.mark.parametrize("capability", [75, 90])
def test_another_gpu(recorded_path: Path, open_recorded: Open, recording: Any, capability: int) -> None:
    gpu = Gpu(name="H200", compute_capability=capability)
    text = refusal(MissingDependencyError, recorded_path, open_recorded, recording, gpu=gpu)
    assert f"compiled for compute capability 8.0, the GPU is H200, {capability / 10}: build for a profile" in text


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"graph": "prefill"}, "graph 'step' expected, 'prefill' found"),
        ({"capacity": 64}, "capacity 32 expected, 64 found"),
        ({"precision": "w8a8"}, "precision 'fp16' expected, 'w8a8' found"),
        ({"runtime": "tensorrt"}, "runtime 'tensorrt-rtx' expected, 'tensorrt' found"),
        ({"compute_capability": 86}, "compute_capability 80 expected, 86 found"),
        ({"unroll": 2}, "unroll 1 expected, 2 found"),
        ({"aliases": []}, "in-place updates"),
        ({"inputs": []}, "input state: float32 [batch, 1, 32] expected, nothing found"),
        ({"outputs": [{"name": "logits", "dtype": "float16", "dims": ["batch", 256]}]}, "logits: float16"),
    ],
)
def test_a_sidecar_that_belongs_to_something_else(
    copied: Path, open_recorded: Open, recording: Any, changes: dict[str, Any], complaint: str
) -> None:
    change_sidecar(copied, **changes)
    text = refusal(BundleError, copied, open_recorded, recording)
    assert complaint in text
    assert "build it again" in text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "expected the facts about an engine as JSON"),
        (b"\xff\xfe", "expected the facts about an engine as JSON"),
        (b"[" * 100_000, "expected the facts about an engine as JSON"),
        (b'{"graph": ' + b"[" * 300 + b"]" * 300 + b"}", "expected the facts about an engine as JSON"),
        (b'{"graph": "step", "graph": "step"}', "expected the facts about an engine as JSON"),
        (b'{"capacity": NaN}', "expected the facts about an engine as JSON"),
        (b'{"capacity": 9223372036854775808}', "expected the facts about an engine as JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"{}", "'graph' must be str, found None"),
        (b'{"graph": true}', "'graph' must be str, found True"),
    ],
)
def test_a_damaged_sidecar(copied: Path, open_recorded: Open, recording: Any, content: bytes, complaint: str) -> None:
    change(copied, SIDECAR, content)
    assert complaint in refusal(BundleError, copied, open_recorded, recording)


INPUT = {"name": "x", "dtype": "int64", "dims": [1]}


@pytest.mark.parametrize(
    "inputs", [[{"name": "x"}], [7], {"a": 1}, [INPUT], [{**INPUT, "min": [1], "max": [float("inf")]}]]
)
def test_a_sidecar_with_malformed_inputs(copied: Path, open_recorded: Open, recording: Any, inputs: Any) -> None:
    change_sidecar(copied, inputs=inputs)
    assert str(copied / SIDECAR) in refusal(BundleError, copied, open_recorded, recording)


@pytest.mark.parametrize("options", [None, 2, [], {}, {"ampere_plus": 1}, {"ampere_plus": [False]}])
def test_options_that_no_engine_was_built_with(copied: Path, open_recorded: Open, recording: Any, options: Any) -> None:
    change_sidecar(copied, options=options)
    assert "options" in refusal(BundleError, copied, open_recorded, recording)


@pytest.mark.parametrize("side", ["min", "opt", "max"])
@pytest.mark.parametrize("sizes", [[], [1], [1, 1, 1], [0, 1], [-1, 1], [1.0, 1], [True, 1], ["1", 1], 7, None])
def test_sizes_that_no_shape_has(copied: Path, open_recorded: Open, recording: Any, side: str, sizes: Any) -> None:
    inputs = json.loads((copied / SIDECAR).read_text())["inputs"]
    assert len(inputs[0]["dims"]) == 2
    change_sidecar(copied, inputs=[{**inputs[0], side: sizes}, *inputs[1:]])
    assert "must be 2 sizes of 1 or more" in refusal(BundleError, copied, open_recorded, recording)


def test_an_input_that_stands_twice(copied: Path, open_recorded: Open, recording: Any) -> None:
    inputs = json.loads((copied / SIDECAR).read_text())["inputs"]
    change_sidecar(copied, inputs=[*inputs, inputs[0]])
    assert "stands twice" in refusal(BundleError, copied, open_recorded, recording)


def test_an_engine_file_that_is_not_what_was_built(copied: Path, open_recorded: Open, recording: Any) -> None:
    (copied / ENGINE).write_bytes((copied / ENGINE).read_bytes()[:-1])
    assert "bytes, the manifest says" in refusal(BundleError, copied, open_recorded, recording)


def test_a_target_without_engines(copied: Path, open_recorded: Open, recording: Any) -> None:
    manifest = json.loads((copied / MANIFEST_NAME).read_text())
    del manifest["targets"]["recorded"]["engines"]["step"]
    (copied / MANIFEST_NAME).write_text(json.dumps(sealed(manifest)))
    assert "target recorded has no step engine" in refusal(BundleError, copied, open_recorded, recording)


def test_a_machine_without_gpu_names_everything_that_is_missing(
    recorded_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load_bundle(recorded_path, allow_unvalidated=True) as bundle:
        assert not bundle.target("recorded").runs_here
        with pytest.raises(MissingDependencyError, match=r"running recorded needs .* an NVIDIA GPU of compute cap"):
            bundle.session("recorded")
        monkeypatch.setattr("crt_export.environment.importlib.util.find_spec", lambda module: None)
        with pytest.raises(MissingDependencyError) as caught:
            bundle.session("recorded")
    for name in ("tensorrt-rtx 1.7 or newer", "cuda-bindings 13 or newer", "an NVIDIA GPU"):
        assert name in str(caught.value)


# --- when the engine is loaded --------------------------------------------------------------------------------------
def test_a_truncated_engine(copied: Path, open_recorded: Open, recording: Any) -> None:
    change(copied, ENGINE, (copied / ENGINE).read_bytes()[:-10])
    with (
        open_recorded(copied, recording) as bundle,
        pytest.raises(ContractError, match=r"cannot load this engine of .*stdArchiveReader failed.*diagnostics 0x20"),
    ):
        bundle.session("recorded")


@pytest.mark.parametrize(
    ("mutate", "complaint"),
    [
        (lambda v: v["aliases"].pop(), "present_key_values.0.value must share memory with past_key_values.0.value"),
        (lambda v: v["inputs"].pop(0), r"input input_ids: int64 \[batch, 1\] expected, nothing found"),
        (lambda v: v["outputs"][0].update(dtype="float16"), "logits"),
        (lambda v: v["inputs"][2].update(max=[9, 1, 32]), r"state must take shapes \[1, 1, 32\] to \[4, 1, 32\]"),
        (
            lambda v: v["outputs"].append({"name": "x", "dtype": "float32", "dims": [1]}),
            r"output x: float32 \[1\] found, which is not part of the contract",
        ),
    ],
)
def test_an_engine_that_is_not_what_its_sidecar_says(
    recorded_path: Path, open_recorded: Open, recording: Any, mutate: Callable[[Any], object], complaint: str
) -> None:
    recording.api.mutate = mutate
    with open_recorded(recorded_path, recording) as bundle, pytest.raises(ContractError, match=complaint):
        bundle.session("recorded")


@pytest.mark.parametrize("call", ["create_stream", "allocate", "fill_zero", "synchronize"])
def test_a_device_that_fails_while_a_session_is_opened(
    recorded_path: Path, open_recorded: Open, recording: Any, call: str
) -> None:
    recording.device.fail[call] = 0
    with open_recorded(recorded_path, recording) as bundle:
        with pytest.raises(ContractError, match=f"{call} failed with cudaErrorInjected"):
            bundle.session("recorded")
        recording.device.fail.clear()
        assert np.isfinite(bundle.session("recorded").prefill([PROMPT])).all()
    assert recording.device.live["memory"] == 0


# --- while it runs --------------------------------------------------------------------------------------------------
DEVICE_CALLS = [
    *("allocate", "create_stream", "copy_to_device", "copy_to_host", "copy", "synchronize"),
    *("begin_capture", "end_capture", "launch_graph"),
]
TENSORRT_CALLS = {
    "create_execution_context": "no execution context, most often for lack of GPU memory",
    "set_input_shape": r"(?s)TensorRT refused \(.*does not satisfy.*: 5 problems.*shape \[1, 1\] of input_ids",
    "set_tensor_address": r"(?s)TensorRT refused .*: 11 problems.*address 0x\w+ of next_state",
    "execute_async_v3": r"TensorRT did not run the engine \(Error Code 1",
    "captured execute_async_v3": r"TensorRT did not run the engine \(Error Code 1",
    "is_stream_capturable": "cannot be captured into a CUDA graph",
}


def expect_poison_then_recovery(bundle: Bundle, recording: Any, complaint: str, spoil: Callable[[], object]) -> None:
    """The first step fails, the session refuses to go on, and after reset() it computes as if nothing had been."""
    session, twin = bundle.session("recorded"), bundle.session("ort-cpu-fp32")
    session.prefill([PROMPT])
    twin.prefill([PROMPT])
    spoil()
    with pytest.raises(ContractError, match=complaint):
        session.step([70])
    recording.device.fail.clear()
    recording.api.fail.clear()
    with pytest.raises(InputError, match=r"an earlier call of this session failed"):
        session.step([70])
    session.reset()
    session.prefill([PROMPT])
    np.testing.assert_allclose(session.step([70]), twin.step([70]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("call", DEVICE_CALLS)
def test_a_device_call_that_fails_in_the_first_step(
    recorded_path: Path, open_recorded: Open, recording: Any, call: str
) -> None:
    with open_recorded(recorded_path, recording) as bundle:
        complaint = f"{call} failed with cudaErrorInjected"
        expect_poison_then_recovery(bundle, recording, complaint, lambda: recording.device.fail.update({call: 0}))


@pytest.mark.parametrize("call", TENSORRT_CALLS)
def test_a_tensorrt_call_that_fails_in_the_first_step(
    recorded_path: Path, open_recorded: Open, recording: Any, call: str
) -> None:
    with open_recorded(recorded_path, recording) as bundle:
        expect_poison_then_recovery(bundle, recording, TENSORRT_CALLS[call], lambda: recording.api.fail.add(call))


@pytest.mark.parametrize("call", ["launch_graph", "synchronize", "copy_to_host"])
def test_a_device_call_that_fails_in_a_later_step(
    recorded_path: Path, open_recorded: Open, recording: Any, call: str
) -> None:
    """The graph that failed is captured anew once the session has been reset."""
    with open_recorded(recorded_path, recording) as bundle:
        session, twin = bundle.session("recorded"), bundle.session("ort-cpu-fp32")
        for token in (70, 71, 72):
            session.step([token])
        recording.device.fail[call] = 0
        with pytest.raises(ContractError, match=f"{call} failed with cudaErrorInjected"):
            session.step([73])
        recording.device.fail.clear()
        session.reset()
        for token in (70, 71, 72):
            np.testing.assert_allclose(session.step([token]), twin.step([token]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "call", ["allocate", "allocate_host", "copy_to_device", "copy_to_host", "synchronize", "execute_async_v3"]
)
def test_a_call_that_fails_in_a_prefill(recorded_path: Path, open_recorded: Open, recording: Any, call: str) -> None:
    complaint = f"{call} failed with cudaErrorInjected"
    if call in TENSORRT_CALLS:
        recording.api.fail.add(call)
        complaint = "recorded prefill: TensorRT did not run the engine"
    with open_recorded(recorded_path, recording) as bundle:
        session, twin = bundle.session("recorded"), bundle.session("ort-cpu-fp32")
        if call not in TENSORRT_CALLS:
            recording.device.fail[call] = 0
        with pytest.raises(ContractError, match=complaint):
            session.prefill([PROMPT])
        recording.api.fail.clear()
        session.reset()
        np.testing.assert_allclose(session.prefill([PROMPT]), twin.prefill([PROMPT]), rtol=0, atol=1e-5)
