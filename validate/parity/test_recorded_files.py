"""What ran and what ships: the files that evidence opens of a target are those that a session opens, and no others.

Besides them are ``step`` and ``prefill`` of a target for a CPU, which one check ties to the graph of its sessions, and
``head``, through which validation makes logits of hidden states. The contract level, which runs nothing, reads all.
Of a compiled target a session opens engines, and evidence the ONNX files that they were compiled from.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from crt_export.bundle import open_bundle
from crt_export.checkpoint import Checkpoint
from crt_export.machine import Gpu
from crt_export.parity import ParityOptions, check_parity
from crt_export.parity.check import case_from_manifest
from crt_export.parity.levels import CERTIFICATE, CHAIN, CONTRACT, CORPUS, FREE_RUNNING, LONG_RUN, ONE_STEP
from crt_export.runtime import Bundle
from crt_export.text import TokenText

#: Every level that decodes a target, as short as it gets.
DECODING = (CHAIN, CORPUS, FREE_RUNNING, CERTIFICATE)
CPU_TARGETS = ("ort-cpu-fp32", "ort-cpu-int8")
SHORT: dict[str, Any] = {
    "validation_tokens": 64,
    "window": 32,
    "chain_windows": 2,
    "chain_steps": 8,
    "prompts": 2,
    "new_tokens": 4,
    "long_run_tokens": 2000,
    "short_reason": "which files are opened",
    "threads": 1,
}
A100 = Gpu(name="A100", compute_capability=80)


def _of_evidence(
    bundle: Path, checkpoint: Checkpoint, text: TokenText, target: str, levels: tuple[str, ...]
) -> set[str]:
    files = open_bundle(bundle, allow_unvalidated=True)
    report = check_parity(
        checkpoint, [case_from_manifest(files, target)], text, options=ParityOptions(levels=levels, **SHORT)
    )
    ran = {result.level for result in report.levels if result.target == target and result.checks}
    assert ran >= set(levels), report.failures
    return set(files.used)


def _of_a_session(bundle: Path, text: TokenText, target: str, *opener: Any) -> set[str]:
    files = open_bundle(bundle, allow_unvalidated=True)
    with Bundle(files, *opener) as opened:
        session = opened.session(target, threads=1)
        session.prefill([text.ids[:8]], passes=2)
        session.step([1])
    return set(files.used)


def _graphs(bundle: Path, target: str) -> dict[str, str]:
    return open_bundle(bundle, allow_unvalidated=True).manifest["targets"][target]["graphs"]


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_evidence_opens_what_a_session_opens(
    three_targets: Path, parity_checkpoint: Checkpoint, real_text: TokenText, target: str
) -> None:
    evidence = _of_evidence(three_targets, parity_checkpoint, real_text, target, (ONE_STEP, *DECODING))
    session = _of_a_session(three_targets, real_text, target)
    graphs = _graphs(three_targets, target)
    beside = {graphs[name] for name in ("step", "prefill", "head")}
    assert evidence == session | beside, _sets(evidence, session)
    assert not session & beside, _sets(evidence, session)
    assert graphs["prefill_pass"] in session


@pytest.mark.parametrize("target", CPU_TARGETS)
@pytest.mark.parametrize("level", [*DECODING, pytest.param(LONG_RUN, marks=pytest.mark.evidence)])
def test_only_the_one_step_level_opens_graphs_beside_those_of_a_session(
    three_targets: Path, parity_checkpoint: Checkpoint, real_text: TokenText, level: str, target: str
) -> None:
    evidence = _of_evidence(three_targets, parity_checkpoint, real_text, target, (level,))
    session = _of_a_session(three_targets, real_text, target)
    assert evidence - {_graphs(three_targets, target)["head"]} == session, _sets(evidence, session)


@pytest.fixture(scope="module")
def compiled(three_targets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a target of TensorRT-RTX, the engines of which ``RecordingTensorRT`` runs."""
    output = tmp_path_factory.mktemp("compiled") / "bundle"
    recording = _of_the_unit_tests("recording_bundle")
    recording.add_recorded_target(three_targets, output, [recording.recorded_profile(64, 32)], base="ort-cuda-fp16")
    return output


@pytest.mark.parametrize("level", [*DECODING, pytest.param(LONG_RUN, marks=pytest.mark.evidence)])
def test_evidence_of_a_compiled_target_opens_what_its_engines_were_compiled_from(
    compiled: Path, parity_checkpoint: Checkpoint, real_text: TokenText, level: str
) -> None:
    from crt_export.engine.tensorrt.engine import Machine
    from crt_export.runtime.opening import compiled_engine

    device = _of_the_unit_tests("recording_device").RecordingDevice()
    machine = Machine(api=_of_the_unit_tests("recording_tensorrt").RecordingTensorRT(device), device=device, gpu=A100)

    def open_engine(files: Any, target: Any, config: Any, threads: int) -> Any:
        return compiled_engine(files, target, config, machine)

    evidence = _of_evidence(compiled, parity_checkpoint, real_text, "recorded", (level,))
    session = _of_a_session(compiled, real_text, "recorded", open_engine)
    entry = open_bundle(compiled, allow_unvalidated=True).manifest["targets"]["recorded"]
    engines = entry["engines"]
    assert session == {*engines.values(), *(str(Path(file).with_suffix(".json")) for file in engines.values())}
    sources = {entry["graphs"][name] for name in engines} | {"graphs/fp16.weights"}
    # Passes one by one are validation's, as is the head: the engine makes all K in one call.
    beside = {entry["graphs"][name] for name in ("head", "prefill_pass")}
    assert evidence - beside <= sources, _sets(evidence, session)
    assert entry["graphs"]["step"] in evidence


def test_the_contract_is_checked_of_every_graph(
    three_targets: Path, parity_checkpoint: Checkpoint, real_text: TokenText
) -> None:
    evidence = _of_evidence(three_targets, parity_checkpoint, real_text, "ort-cpu-fp32", (CONTRACT,))
    assert evidence >= set(_graphs(three_targets, "ort-cpu-fp32").values())


def _sets(evidence: set[str], session: set[str]) -> str:
    return f"evidence opened {sorted(evidence)}, a session opened {sorted(session)}"


def _of_the_unit_tests(module: str) -> Any:
    folder = str(Path(__file__).parents[1] / "unit" / "engine")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(module)
