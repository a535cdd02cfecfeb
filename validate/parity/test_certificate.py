"""L5: what is exact is held to be exact, what is a figure is right on made data, faults in the passes are named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fault_bundle import SpoiledBundle
from fault_edits import Edit, constant, nan_at, node, replace_value, shift_input
from short_setup import check_of, short_setup

from crt_export.bundle import open_bundle
from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.errors import ContractError
from crt_export.parity import ParityCase, ParityOptions
from crt_export.parity.certificate import certify, measurement, runs
from crt_export.parity.certificate.curves import residual_curve
from crt_export.parity.certificate.measurement import compare_states, coverage_of
from crt_export.parity.certificate.runs import ReferenceRun
from crt_export.parity.check import case_from_manifest
from crt_export.parity.report import LevelResult
from crt_export.parity.setup import ParitySetup
from crt_export.pipeline import BuildOptions, build
from crt_export.text import TokenText

WINDOW, TRAINED, UNROLL, COUNT = 48, 32, 2, 6
CPU, GPU = "ort-cpu-fp32", "ort-cuda-fp16"


def _setup(checkpoint: Checkpoint, text: TokenText, **changes: Any) -> ParitySetup:
    values: dict[str, Any] = {"validation_tokens": COUNT * WINDOW, "window": WINDOW, "short_reason": "test of a level"}
    options = ParityOptions(**{**values, **changes}, threads=1)
    return short_setup(checkpoint, text, options)


@pytest.fixture(scope="module")
def setup(parity_checkpoint: Checkpoint, real_text: TokenText) -> ParitySetup:
    return _setup(parity_checkpoint, real_text)


@pytest.fixture(scope="module")
def case(parity_bundle: Path) -> ParityCase:
    return _case(parity_bundle)


@pytest.fixture(scope="module")
def sound(case: ParityCase, setup: ParitySetup) -> LevelResult:
    return certify(case, setup)


def _case(bundle: Path, target: str = CPU) -> ParityCase:
    return case_from_manifest(open_bundle(bundle, allow_unvalidated=True), target)


# --- sound graphs
def test_sound_graphs_are_exact_where_the_equations_are(sound: LevelResult) -> None:
    assert sound.passed, sound.failures
    anchors = {(entry["graph"], entry["tokens"], entry["passes"]): entry for entry in sound.data["anchors"]}
    assert set(anchors) == {("prefill_pass", tokens, tokens) for tokens in (1, 2, 4)} | {("prefill", 2, 2)}
    for entry in anchors.values():
        assert entry["error"] == max(entry["tensors"].values()) < 1e-5
        caches = {f"present_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")}
        assert set(entry["tensors"]) == {"next_hidden", "logits", "head logits", *caches}
    assert max(sound.data["prefix"]) < 1e-5
    assert max(sound.data["prefix"]) > 0, "a figure of zero would mean that nothing was compared"


def test_the_curves_have_the_agreed_shape(sound: LevelResult) -> None:
    data = json.loads(json.dumps(sound.to_dict()))["data"]
    passes = list(range(1, 2 * UNROLL + 1))
    assert (data["unroll"], data["trained"], data["window"], data["windows"]) == (UNROLL, TRAINED, WINDOW, COUNT)
    assert data["passes"] == passes
    assert [(s["start"], s["stop"], s["gated"]) for s in data["spans"]] == [(0, 32, True), (32, 48, False)]
    per_pass = ("nll", "perplexity", "gap_nll", "gap_nll_ci", "perplexity_gap", "perplexity_gap_ci", "kl", "kl_ci")
    for form in (data, data["reference"]):
        for span in form["spans"]:
            assert {name: len(span[name]) for name in per_pass} == dict.fromkeys(per_pass, len(passes))
            assert span["perplexity"][-1] == pytest.approx(math.exp(span["nll"][-1]))
        assert [entry["passes"] for entry in form["residual"]] == passes
        positions = form["positions"]
        assert positions["edges"] == [0, 1, 2, 4, 8, 16, 32, 48]
        assert positions["passes"] == passes, "every K, not powers of two alone"
        assert np.array(positions["gap_nll_ci"]).shape == (4, 7, 2)
        assert np.array(positions["kl"]).shape == (4, 7)
    assert [len(span["excess"]) for span in data["spans"]] == [len(passes)] * 2
    assert (data["handover"]["start"], data["handover"]["stop"], data["handover"]["gated"]) == (16, 32, True)
    above = data["handover_above"]
    assert (above["start"], above["stop"], above["gated"]) == (24, 48, False)
    assert len(above["delta_nll"]) == len(above["max_state_error"]) == len(above["passes"]) == 3


def test_one_pass_differs_and_more_passes_come_closer(sound: LevelResult) -> None:
    kl = sound.data["spans"][0]["kl"]
    assert kl[0] > 1e-4, "one pass ignores the recurrence"
    assert kl[0] > kl[1] > kl[2] > kl[3] > 0
    errors = [entry["error_median"] for entry in sound.data["residual"]]
    assert errors == sorted(errors, reverse=True)
    states = sound.data["handover"]["max_state_error"]
    assert states[0] > states[1] > states[2] > 0


def test_the_first_position_of_every_curve_is_exact(sound: LevelResult) -> None:
    positions = sound.data["positions"]
    for row, passes in zip(positions["kl"], positions["passes"], strict=True):
        exact = [stop for stop in positions["edges"][1:] if stop <= passes]
        assert all(abs(value) < 1e-9 for value in row[: len(exact)])
        assert row[-2] > 1e-9, "past the first K positions there is something to see"


def test_the_target_gives_the_figures_of_the_reference(sound: LevelResult) -> None:
    for own, reference in zip(sound.data["spans"], sound.data["reference"]["spans"], strict=True):
        assert own["nll"] == pytest.approx(reference["nll"], abs=1e-6)
        assert own["kl"] == pytest.approx(reference["kl"], rel=1e-3, abs=1e-9)
        assert np.abs(own["excess"]).max() < 1e-6
        assert reference["excess"] is None
    for name in ("delta_nll", "kl", "max_state_error"):
        assert sound.data["handover"][name] == pytest.approx(sound.data["reference"]["handover"][name], abs=1e-6)


def test_a_model_worse_than_chance_is_judged_by_its_states_only(sound: LevelResult) -> None:
    assert any("worse than a uniform guess" in note for note in sound.notes)
    likelihoods = [c for c in sound.checks if c.name.startswith(("regime gap", "handover"))]
    assert len(likelihoods) == 6
    assert all(check.passed is None and check.interval is not None for check in likelihoods)
    assert all(check.passed for check in sound.checks if check.name.startswith(("anchor", "prefix", "step", "prefill")))


def test_figures_do_not_depend_on_batches_or_pieces(
    sound: LevelResult, case: ParityCase, parity_checkpoint: Checkpoint, real_text: TokenText, monkeypatch: Any
) -> None:
    largest: list[int] = []
    head = runs.TargetRun.head

    def watched(self: runs.TargetRun, hidden: np.ndarray) -> np.ndarray:
        logits = head(self, hidden)
        largest.append(logits.size)
        return logits

    monkeypatch.setattr(runs.TargetRun, "head", watched)
    for module in (measurement, runs):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 10_000)
    parts = certify(case, _setup(parity_checkpoint, real_text, window_batch=4))
    assert max(largest) <= 10_000, "no more logits at a time than a block"
    for own, whole in zip(parts.data["spans"], sound.data["spans"], strict=True):
        assert own["nll"] == pytest.approx(whole["nll"], abs=1e-6)
        assert own["kl_ci"] == [pytest.approx(interval, rel=1e-3, abs=1e-8) for interval in whole["kl_ci"]]
    assert parts.data["handover"]["kl"] == pytest.approx(sound.data["handover"]["kl"], rel=1e-3, abs=1e-8)


def test_enough_passes_over_short_windows_leave_no_gap(
    case: ParityCase, parity_checkpoint: Checkpoint, real_text: TokenText
) -> None:
    result = certify(case, _setup(parity_checkpoint, real_text, validation_tokens=32, window=4))
    assert result.passed, result.failures
    span = result.data["spans"][0]
    assert (span["start"], span["stop"]) == (0, 4)
    assert abs(span["gap_nll"][3]) < 1e-6
    assert span["kl"][3] < 1e-9 < span["kl"][0]
    assert span["smallest_passes"] is not None
    assert result.data["handover_above"] is None
    assert any("nothing is said about positions above" in note for note in result.notes)


# --- what a target or a model lacks
def test_a_target_without_single_passes_is_refused(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    manifest = spoiled.manifest
    del manifest["targets"]["ort-cpu-fp32"]["graphs"]["prefill_pass"]
    spoiled.change_manifest(targets=manifest["targets"])
    with pytest.raises(ContractError, match="ort-cpu-fp32 has no prefill_pass graph, which every number of passes"):
        certify(_case(spoiled.path), setup)


def test_windows_are_as_long_as_the_target_takes_at_once(case: ParityCase, setup: ParitySetup) -> None:
    short = measurement.coverage_of(setup.runner(case), setup, WINDOW - 8)
    assert (short.length, short.whole) == (WINDOW - 8, False)
    assert any(f"the first {WINDOW - 8} of the {WINDOW} tokens" in note for note in short.notes)


def test_windows_are_left_out_where_they_take_too_long(
    case: ParityCase, parity_checkpoint: Checkpoint, real_text: TokenText, monkeypatch: Any
) -> None:
    config = parity_checkpoint.config
    per_window = (config.parameter_count + 150 * config.vocab_size) * WINDOW * 2 * UNROLL
    monkeypatch.setattr(measurement, "MOST_WORK", 3 * per_window)
    setup = _setup(parity_checkpoint, real_text)
    assert coverage_of(setup.runner(case), setup, WINDOW).windows == 3
    result = certify(case, setup)
    assert result.passed, result.failures
    assert result.data["windows"] == 3
    assert any("3 of 6 windows" in note and "reported and not gated" in note for note in result.notes)
    monkeypatch.setattr(measurement, "MOST_WORK", 1)
    assert coverage_of(setup.runner(case), setup, WINDOW).windows == 2, "an interval needs two"


@pytest.mark.evidence  # builds one more model
def test_a_plain_transformer_is_held_to_its_steps(
    make_checkpoint: Callable[..., Path], real_text: TokenText, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(make_checkpoint(model_type="transformer", num_hidden_layers=2, eos_token_id=3))
    bundle = tmp_path / "plain"
    build(BuildOptions(checkpoint=checkpoint.path, output=bundle, targets=("ort-cpu-fp32",), validated=False))
    result = certify(_case(bundle), _setup(checkpoint, real_text))
    assert result.passed, result.failures
    assert [(check.value or 0) < 1e-5 for check in result.checks] == [True]
    entry = result.data["anchors"][0]
    assert (entry["graph"], entry["tokens"], entry["passes"]) == ("prefill", WINDOW, 1)
    assert set(entry["tensors"]) >= {"logits of every step", "present_key_values.1.value"}
    assert result.data["spans"] == result.data["passes"] == []
    assert any("plain transformer" in note for note in result.notes)
    json.dumps(result.to_dict(), allow_nan=False)

    wrong = SpoiledBundle(bundle, tmp_path / "wrong", CPU)
    wrong.edit(["prefill"], shift_input("LessOrEqual", 1, 1))  # a prompt sees one future token, a step has none
    wrong.sign()
    failed = certify(_case(wrong.path), _setup(checkpoint, real_text))
    assert failed.passed is False
    assert "expected at most" in failed.failures[0]


# --- faults
#: The pass starts from zero whatever it is fed.
_drop_hidden = replace_value(
    "hidden",
    constant("nothing", 0, np.float32),
    node("Mul", ["hidden", "nothing"], "dropped"),
    result="dropped",
)


def _unshift(model: onnx.ModelProto) -> None:
    """Every token reads its own h of the last pass, not that of the token before it."""
    concat = next(n for n in model.graph.node if n.op_type == "Concat" and list(n.input) == ["state", "hidden"])
    concat.input[:] = ["hidden", "state"]


def _ignore_state(model: onnx.ModelProto) -> None:
    replace_value(
        "state", constant("nothing", 0, np.float32), node("Mul", ["state", "nothing"], "stateless"), result="stateless"
    )(model)


def _halve_residual(model: onnx.ModelProto) -> None:
    for existing in model.graph.node:
        existing.output[:] = ["before" if name == "residual" else name for name in existing.output]
    model.graph.initializer.append(constant("half", 0.5, np.float32))
    model.graph.node.append(node("Mul", ["before", "half"], "residual"))


_TWO_STEPS = "anchor: 2 passes of prefill_pass over 2 tokens are 2 steps"
_PREFIX = "prefix: after K passes of prefill_pass the first K positions are exact"


@pytest.mark.parametrize(
    ("target", "graph", "edit", "failed"),
    [
        (GPU, "prefill_pass", _drop_hidden, (_TWO_STEPS, _PREFIX, "prefill: 2 passes are 2 calls of prefill_pass")),
        (GPU, "prefill_pass", _halve_residual, ("prefill_pass: residual is the change of next_hidden",)),
        (GPU, "step", _ignore_state, (_TWO_STEPS, _PREFIX, "anchor: 2 passes of prefill over 2 tokens are 2 steps")),
        # On a CPU the same graph makes the steps, and leaves out of a pass what is exact already.
        (CPU, "prefill_pass", _unshift, (_TWO_STEPS, _PREFIX)),
        (CPU, "prefill_pass", _halve_residual, ("prefill_pass: residual is the change of next_hidden",)),
    ],
)
def test_a_fault_in_the_passes_is_named(
    three_targets: Path,
    setup: ParitySetup,
    tmp_path: Path,
    target: str,
    graph: str,
    edit: Edit,
    failed: tuple[str, ...],
) -> None:
    spoiled = SpoiledBundle(three_targets, tmp_path / "bundle", target)
    spoiled.edit([graph], edit)
    spoiled.sign()
    result = certify(_case(spoiled.path, target), setup)
    assert result.passed is False
    for name in failed:
        failure = next(failure for failure in result.failures if failure.startswith(name))
        assert "expected at most" in failure
    assert check_of(result, "anchor: 1 passes").passed, "one token needs neither state nor shift"


def test_one_pass_too_few_in_prefill_is_named(three_targets: Path, setup: ParitySetup, tmp_path: Path) -> None:
    bundle = SpoiledBundle(three_targets, tmp_path / "bundle", GPU)
    shutil.copyfile(bundle.graphs["prefill_pass"], bundle.graphs["prefill"])
    bundle.sign()
    failures = certify(_case(bundle.path, GPU), setup).failures
    assert [failure.split(":")[0] for failure in failures] == ["anchor", "prefill"]
    assert failures[0].startswith("anchor: 2 passes of prefill over 2 tokens are 2 steps")


def test_nan_in_a_state_is_an_error_that_says_where(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    spoiled.edit(["prefill_pass"], nan_at("next_state", 7))
    spoiled.sign()
    with pytest.raises(ContractError, match="next_state is NaN or infinite, first in window 0 at position 7"):
        certify(_case(spoiled.path), setup)


# --- arithmetic on a small model
def test_likelihoods_are_right_to_a_nanonat(parity_checkpoint: Checkpoint, setup: ParitySetup) -> None:
    run = ReferenceRun(setup.reference, COUNT, WINDOW)
    chain = run.chain(slice(0, COUNT))
    nudged = chain.hidden + np.float32(1e-4)
    targets = setup.windows.targets
    sequential, nll, kl = compare_states(run, chain.hidden, nudged[None], targets)
    wide = [run.head(states).astype(np.longdouble) for states in (chain.hidden, nudged)]
    logs = [logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)) for logits in wide]
    expected = [-np.take_along_axis(log, targets[..., None], -1)[..., 0] for log in logs]
    assert np.abs(sequential - expected[0]).max() < 1e-9
    assert np.abs(nll[0] - expected[1]).max() < 1e-9
    assert np.abs(kl[0] - (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1)).max() < 1e-12


def test_reference_windows_that_are_left_out_change_nothing(setup: ParitySetup) -> None:
    few, all_windows = ReferenceRun(setup.reference, 2, WINDOW), ReferenceRun(setup.reference, COUNT, WINDOW)
    assert np.abs(few.chain(slice(0, 2)).hidden - all_windows.chain(slice(0, 2)).hidden).max() < 1e-5


def test_residual_figures_of_made_windows(case: ParityCase, setup: ParitySetup) -> None:
    residual = np.array([[1.0, 2.0, 4.0, 8.0]] * 3 + [[0.0] * 4])
    error = np.array([[0.5, 1.0, 2.0, 4.0], [4.0, 2.0, 1.0, 0.5], [1.0] * 4, [0.0] * 4])
    nothing = np.zeros((4, 4))
    made = measurement.Measurement(
        sequential_nll=nothing, nll=nothing, kl=nothing, prefix_error=nothing[0], continuations=(),
        residual=residual, error=error,
    )  # fmt: skip
    falling, rising, flat, still = residual_curve(made, coverage_of(setup.runner(case), setup, WINDOW))
    assert (falling["ratio_median"], falling["ratio_p95"], falling["correlation"]) == (0.5, 0.5, pytest.approx(1))
    assert rising["correlation"] == pytest.approx(-1)
    assert rising["error_max"] == 4
    assert (flat["correlation"], flat["ratio_median"]) == (None, pytest.approx(0.375))
    assert (still["ratio_median"], still["ratio_p95"], still["correlation"]) == (None, None, None)
