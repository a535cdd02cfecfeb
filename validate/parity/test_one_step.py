"""L1: one call of every graph from PyTorch's own inputs; every output, every slot of the caches."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fault_bundle import SpoiledBundle
from fault_edits import Edit, constant, node, replace_output, replace_value, times_zero
from onnx import TensorProto
from polygraphy import comparator
from polygraphy.logger import G_LOGGER
from short_setup import short_setup

from crt_export.bundle import open_bundle
from crt_export.checkpoint import Checkpoint
from crt_export.engine import onnxruntime
from crt_export.engine.onnxruntime import OrtGraph
from crt_export.errors import BundleError, ContractError
from crt_export.parity import ParityCase, ParityOptions, one_step_calls
from crt_export.parity.check import case_from_manifest
from crt_export.parity.difference import difference
from crt_export.parity.metrics import METRICS
from crt_export.parity.one_step import check_one_step
from crt_export.parity.one_step_calls import OneStepCalls
from crt_export.parity.report import LevelResult
from crt_export.parity.setup import ParitySetup
from crt_export.text import TokenText

FIGURE = METRICS["tensor_error"].figure

LENGTH = 32
GRAPHS = ("step", "prefill", "prefill_pass", "head")
CACHES = [f"present_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
TIED = [f"prefill: 2 passes are 2 calls of prefill_pass{exactly}" for exactly in (", bit by bit", "")]


@pytest.fixture(scope="session")
def setup(parity_checkpoint: Checkpoint, real_text: TokenText) -> ParitySetup:
    return _setup(parity_checkpoint, real_text, LENGTH)


def _setup(checkpoint: Checkpoint, text: TokenText, length: int) -> ParitySetup:
    options = ParityOptions(validation_tokens=8 * length, window=length, short_reason="a test of levels", threads=1)
    return short_setup(checkpoint, text, options)


def _check(bundle: Path, setup: ParitySetup, target: str = "ort-cpu-fp32") -> LevelResult:
    return check_one_step(_case(bundle, target), setup)


def _case(bundle: Path, target: str = "ort-cpu-fp32") -> ParityCase:
    return case_from_manifest(open_bundle(bundle, allow_unvalidated=True), target)


def _edit(bundle: SpoiledBundle, name: str, edit: Edit) -> Path:
    bundle.edit([name], edit)
    bundle.sign()
    return bundle.path


def _scaled(output: str, factor: float) -> Edit:
    return replace_output(output, constant("factor", factor, np.float32), node("Mul", ["before", "factor"], output))


def test_sound_graphs_pass_with_every_output_compared(parity_bundle: Path, setup: ParitySetup) -> None:
    result = _check(parity_bundle, setup)
    assert result.passed, result.failures
    names = [check.name for check in result.checks]
    tokens = ["logits", "next_token", "next_position", "next_state"]
    for graph in ("prefill", "prefill_pass"):
        assert [name for name in names if name.startswith(f"{graph}:")] == [
            *(f"{graph}: {tensor}" for tensor in (*tokens, "next_hidden", "residual", *CACHES)),
            *(TIED if graph == "prefill" else ()),
        ]
    assert [name for name in names if name.startswith("step:")] == [
        *(f"step: {tensor}" for tensor in (*tokens, *CACHES)),
        "step: 64 tokens are 64 calls of prefill_pass, bit by bit",
    ]
    assert "head: logits" in names
    figures = [check.value for check in result.checks if check.figure == FIGURE and check.name not in TIED]
    assert all(value is not None and 0 < value < 2e-6 for value in figures), figures
    assert result.data["positions"] == [0, 1, 8, 16]
    assert set(result.data["tensors"]["head"]["logits"]) == {"max_abs", "mean_abs", "relative", "limit"}


def test_the_calls_cover_what_the_contract_promises(parity_bundle: Path, setup: ParitySetup) -> None:
    calls = OneStepCalls(_case(parity_bundle), setup)
    zero, other = calls.of("prefill")
    assert zero.inputs["length"].tolist() == [16, 16, 8, 0]
    assert zero.inputs["position"].tolist() == [0, 16, 16, 8]
    assert not zero.inputs["hidden"].any()
    assert other.inputs["hidden"].any()
    assert np.array_equal(zero.expected["next_state"][3], zero.inputs["state"][3]), "a row of length 0 keeps its state"
    assert zero.expected["residual"][3] == 0
    assert not zero.inputs["past_key_values.1.key"][1, :, 16:].any()
    empty, middle = calls.of("step")
    assert not empty.inputs["state"].any()
    assert middle.inputs["state"].any()


def test_weight_only_graphs_are_within_their_limit(three_targets: Path, setup: ParitySetup) -> None:
    result = _check(three_targets, setup, "ort-cpu-int8")
    assert result.passed, result.failures
    limits = {check.limit for check in result.checks if check.figure == FIGURE}
    assert limits == {setup.tolerances.precisions["w8"].tensor_error}
    assert max(check.value or 0 for check in result.checks) > 1e-4, "it is quantised"


def test_windows_of_two_tokens_suffice(parity_bundle: Path, setup: ParitySetup, real_text: TokenText) -> None:
    short = _setup(setup.checkpoint, real_text, 2)
    result = _check(parity_bundle, short)
    assert result.passed, result.failures
    assert result.data["positions"] == [0, 1]


@pytest.mark.parametrize(
    ("graph", "edit", "check", "sentence"),
    [
        (
            "prefill_pass",
            _scaled("logits", 1.001),
            "step: logits",
            f"{METRICS['tensor_error'].figure} is 0.001, expected at most 1e-05",
        ),
        (
            "prefill_pass",
            _scaled("next_state", 0.0),
            "step: next_state",
            f"{METRICS['tensor_error'].figure} is 1, expected",
        ),
        (
            "prefill_pass",
            _scaled("next_state", float("nan")),
            "step: next_state",
            "next_state is NaN or infinite at position 0",
        ),
        ("head", _scaled("logits", 1.001), "head: logits", "hidden states of the recurrence"),
        ("prefill_pass", _scaled("residual", 1.01), "prefill: residual", f"{METRICS['tensor_error'].figure} is"),
        (
            "prefill_pass",
            _scaled("next_hidden", 1.001),
            "prefill_pass: next_hidden",
            f"{METRICS['tensor_error'].figure} is 0.001",
        ),
        ("prefill_pass", replace_value("length", result="position"), "prefill: next_position", "expected 16"),
        (
            "prefill_pass",
            replace_output("next_token", constant("zero", 0), node("Mul", ["before", "zero"], "next_token")),
            "step: next_token",
            "the argmax of the graph's own logits is",
        ),
        (
            "prefill_pass",
            replace_output("next_position", node("Identity", ["position"], "next_position")),
            "step: next_position",
            "is 0, expected 1 (position 0, length 1 of 1; empty cache)",
        ),
        ("prefill_pass", _scaled(CACHES[2], 1.01), "prefill: present_key_values.1.key", "slots before 16 were changed"),
        (
            "prefill_pass",
            replace_output(CACHES[1], constant("stray", 0.25, np.float32), node("Add", ["before", "stray"], CACHES[1])),
            "step: present_key_values.0.value",
            "slot 1 is not zero, slots from 1 on are unused (position 0, length 1 of 1; empty cache)",
        ),
    ],
)
def test_a_fault_is_named_by_tensor_and_place(
    spoiled: SpoiledBundle, setup: ParitySetup, graph: str, edit: Edit, check: str, sentence: str
) -> None:
    result = _check(_edit(spoiled, graph, edit), setup)
    assert result.passed is False
    failed = next(found for found in result.checks if found.name == check)
    assert failed.passed is False
    assert any(sentence in failure for failure in failed.failures), failed.failures
    others = ("head:",) if graph != "head" else ("step:", "prefill:", "prefill_pass:")
    assert not [failure for failure in result.failures if failure.startswith(others)], "the other graphs are sound"


@pytest.mark.parametrize("graph", ["prefill_pass", "step"])
def test_another_dtype_is_refused(spoiled: SpoiledBundle, setup: ParitySetup, graph: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        replace_output("logits", node("Cast", ["before"], "logits", to=TensorProto.FLOAT16))(model)
        logits = next(output for output in model.graph.output if output.name == "logits")
        logits.type.tensor_type.elem_type = TensorProto.FLOAT16

    path = _edit(spoiled, graph, change)
    if graph == "prefill_pass":
        with pytest.raises(ContractError, match="output logits"):
            _check(path, setup)
        return
    (failure,) = _check(path, setup).failures
    assert failure.startswith("step: 64 tokens are 64 calls of prefill_pass")
    assert "output logits" in failure


def test_one_weight_off_by_one_per_cent_is_found_in_every_tensor_behind_it(
    spoiled: SpoiledBundle, setup: ParitySetup
) -> None:
    weight = "layers.0.mlp.up.weight"
    spoiled.set_weight_of("prefill_pass", weight, spoiled.weight(weight) * np.float32(1.01))
    spoiled.sign()
    result = _check(spoiled.path, setup)
    failed = {check.name for check in result.checks if check.passed is False}
    assert {"step: logits", "step: next_state", f"step: {CACHES[2]}", f"step: {CACHES[3]}"} <= failed
    assert f"step: {CACHES[0]}" not in failed, "what lies before the weight is right"


def test_state_that_is_not_read_is_found(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    path = _edit(spoiled, "prefill_pass", replace_value("state", *times_zero("state", "nothing"), result="nothing"))
    failures = [failure for failure in _check(path, setup).failures if failure.startswith("step: logits")]
    assert failures
    assert all("middle of the text" in failure for failure in failures), "with an empty state nothing is missing"


def test_saved_outputs_open_in_polygraphy(parity_bundle: Path, setup: ParitySetup, tmp_path: Path) -> None:
    saving = dataclasses.replace(setup, saved_outputs=tmp_path / "outputs")
    check_one_step(_case(parity_bundle), saving)
    folder = tmp_path / "outputs" / "ort-cpu-fp32"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.json" for name in GRAPHS)
    tool = Path(sys.executable).with_name("polygraphy")
    command = [str(tool), "inspect", "data", str(folder / "step.json")]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "Run Results (2 runners)" in shown.stdout
    assert "---- ort-cpu-fp32 (2 iterations) ----" in shown.stdout
    assert "---- pytorch-fp32 (2 iterations) ----" in shown.stdout
    assert "present_key_values.1.value [dtype=float32, shape=(4, 4, 1, 4)]" in shown.stdout


def test_the_same_outputs_are_saved_twice_alike(parity_bundle: Path, setup: ParitySetup, tmp_path: Path) -> None:
    for name in ("one", "other"):
        saving = dataclasses.replace(setup, saved_outputs=tmp_path / name)
        check_one_step(_case(parity_bundle), saving)
    for graph in GRAPHS:
        one, other = (tmp_path / name / "ort-cpu-fp32" / f"{graph}.json" for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_nothing_is_printed(parity_bundle: Path, setup: ParitySetup, capfd: pytest.CaptureFixture[str]) -> None:
    _check(parity_bundle, setup)
    assert capfd.readouterr() == ("", "")


def test_an_unreadable_file_is_refused(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    spoiled.graphs["step"].write_bytes(b"not a protobuf")
    spoiled.sign()
    with pytest.raises(BundleError, match="step"):
        _check(spoiled.path, setup)


def test_not_a_number_is_within_no_limit() -> None:
    found = np.array([[1, np.nan], [1, 1]], np.float32)
    error = difference(found, np.ones((2, 2), np.float32), 1e9)
    assert not error.passed
    assert np.isnan(error.largest)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("limit", [0.0, 1e-3, 10.0])
def test_differences_are_those_of_polygraphys_comparator(dtype: str, limit: float) -> None:
    generator = np.random.default_rng(0)
    expected = generator.standard_normal((4, 3, 700)).astype(np.float32)
    for scale in (0.0, 1e-2):
        found = (expected + scale * generator.standard_normal(expected.shape)).astype(dtype)
        own = difference(found, expected, limit)
        results = comparator.RunResults()
        results.add([{"x": found}], runner_name="found")
        results.add([{"x": expected}], runner_name="expected")
        function = comparator.SimpleCompareFunc(check_error_stat="max", atol=limit, rtol=0.0)
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            (its,) = comparator.Comparator.compare_accuracy(results, compare_func=function)[0]["found", "expected"]
        assert (own.largest, own.mean) == (its["x"].max_absdiff, its["x"].mean_absdiff)
        assert own.passed is bool(its["x"])


def test_reference_is_computed_once_for_targets_with_the_same_inputs(
    parity_bundle: Path, setup: ParitySetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _check(parity_bundle, setup)
    monkeypatch.setattr(one_step_calls, "reference_outputs", lambda *_: pytest.fail("computed again"))
    assert _check(parity_bundle, setup).to_dict() == first.to_dict()


def test_every_graph_is_loaded_once(
    parity_bundle: Path, parity_checkpoint: Checkpoint, real_text: TokenText, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = onnxruntime.load_with_settings

    def watched(library: Any, graph: Any, *rest: Any, **options: Any) -> OrtGraph:
        loaded.append(graph.path.name)
        return load(library, graph, *rest, **options)

    monkeypatch.setattr(onnxruntime, "load_with_settings", watched)
    _check(parity_bundle, _setup(parity_checkpoint, real_text, LENGTH))
    assert sorted(loaded) == [f"{name}.fp32.onnx" for name in sorted(GRAPHS)]
