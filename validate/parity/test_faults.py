"""What the rows of the corpus level say of a fault in a built ONNX file, how far it came and what is left of it.

Which level catches which fault: ``test_fault_injection.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fault_bundle import SpoiledBundle
from fault_edits import Edit, constant, node, replace_output
from faults_of_graphs import ROPE
from onnx import helper

from crt_export.checkpoint import Checkpoint
from crt_export.errors import BundleError
from crt_export.parity import Comparison, ParityOptions, ParityReport, check_parity, validate_bundle
from crt_export.parity.decoding import Decoding
from crt_export.text import TokenText

LENGTH = 32
OPTIONS = ParityOptions(
    validation_tokens=8 * LENGTH, window=LENGTH, short_reason="fault injection", threads=1, levels=("corpus",)
)
GRAPH = "prefill_pass"  # which a session on a CPU loads for steps and prefill alike


@pytest.fixture
def check(parity_checkpoint: Checkpoint, real_text: TokenText) -> Callable[..., ParityReport]:
    def run(bundle: SpoiledBundle, options: ParityOptions = OPTIONS, **changes: Any) -> ParityReport:
        case = dataclasses.replace(bundle.case(), **changes)
        return check_parity(parity_checkpoint, [case], real_text, options=options)

    return run


def _row(report: ParityReport, regime: str) -> Comparison:
    return next(row for row in report.rows if row.target == "ort-cpu-fp32" and row.regime == regime)


def test_sound_files_pass_in_every_regime(spoiled: SpoiledBundle, check: Callable[..., ParityReport]) -> None:
    report = check(spoiled, compiled=("step", "prefill"), runtime="tensorrt-rtx")
    assert report.passed, report.failures
    rows = [row for row in report.rows if row.target == "ort-cpu-fp32"]
    assert [row.regime for row in rows if row.status == "run"] == [
        "step", "prefill", "handover", "regime-gap",
    ]  # fmt: skip
    assert [(row.runtime, row.passed, row.nll) for row in rows if row.status == "compiled"] == [
        ("tensorrt-rtx", None, None)
    ] * 2
    step, handover = _row(report, "step"), _row(report, "handover")
    assert (step.tokens, step.steps, handover.tokens, handover.steps) == (256, 32, 8 * 17, 16)
    error = step.value("max_abs_logit_error")
    assert error is not None
    assert 0 < error < 1e-5
    assert _row(report, "prefill").value("regime_consistency") is not None
    assert any("second half of each window" in note and "136 of 256 tokens" in note for note in report.notes)


def test_a_model_worse_than_chance_is_noted(spoiled: SpoiledBundle, check: Callable[..., ParityReport]) -> None:
    report = check(spoiled)
    ungated = [row for row in report.rows if row.better_than_chance is False]
    assert ungated, "a random model does not fit the text"
    assert any(f"not gated in {len(ungated)} rows" in note for note in report.notes)


def test_windows_in_small_batches_give_the_same_figures(
    spoiled: SpoiledBundle, check: Callable[..., ParityReport]
) -> None:
    whole = _row(check(spoiled), "handover")
    parts = _row(check(spoiled, dataclasses.replace(OPTIONS, window_batch=3)), "handover")
    assert parts.nll == pytest.approx(whole.nll, abs=1e-6)
    assert parts.tokens == whole.tokens


def _rename(model: onnx.ModelProto) -> None:
    replace_output("logits", helper.make_node("Identity", ["before"], ["log_probabilities"]))(model)
    next(output for output in model.graph.output if output.name == "logits").name = "log_probabilities"


def _nan_logits(model: onnx.ModelProto) -> None:
    replace_output(
        "logits",
        constant("nan", np.nan, np.float32),
        helper.make_node("Mul", ["before", "nan"], ["logits"]),
    )(model)


def _cut(end: int) -> Edit:
    """Logits lose entries of axis 1 at run time, against the shape that the file declares."""
    return replace_output(
        "logits",
        constant("start", [0]),
        constant("end", [end]),
        constant("axis", [1]),
        helper.make_node("Slice", ["before", "start", "end", "axis"], ["logits"]),
    )


def _stop_position(model: onnx.ModelProto) -> None:
    replace_output("next_position", helper.make_node("Identity", ["position"], ["next_position"]))(model)


def _wrong_token(model: onnx.ModelProto) -> None:
    replace_output("next_token", helper.make_node("Identity", ["input_ids"], ["next_token"]))(model)


@pytest.mark.parametrize(
    ("graph", "edit", "regime", "sentence"),
    [
        (GRAPH, _rename, "step", "log_probabilities"),
        ("head", _cut(0), "prefill", "nothing was compared"),
        ("head", _cut(0), "prefill", "head: logits are float32 [8, 0, 256], expected float32 [8, 32, 256]"),
        (GRAPH, _cut(-1), "step", "logits: float32 [batch, 255]"),
        (GRAPH, _nan_logits, "prefill", "logits is not finite"),
        (GRAPH, _nan_logits, "handover", "logits is not finite"),
        (GRAPH, _stop_position, "step", "step: next_position is 0 after token 0 of row 0, expected 1"),
        (GRAPH, _wrong_token, "step", "step: next_token after token 0 of row 0 is not the argmax"),
    ],
)
def test_a_fault_in_a_file_fails_its_row(
    spoiled: SpoiledBundle, check: Callable[..., ParityReport], graph: str, edit: Edit, regime: str, sentence: str
) -> None:
    spoiled.edit([graph], edit)
    report = check(spoiled)
    row = _row(report, regime)
    assert not report.passed
    assert row.passed is False
    assert any(sentence in failure for failure in row.failures), row.failures


def test_nan_weight_fails_every_regime_that_runs_it(spoiled: SpoiledBundle, check: Callable[..., ParityReport]) -> None:
    spoiled.set_weight_of(GRAPH, "final_norm.bias", spoiled.weight("final_norm.bias") * np.nan)
    report = check(spoiled)
    assert "NaN or infinite, first in window 0 at position 0" in _row(report, "step").failures[0]
    assert _row(report, "step").nll is None
    assert _row(report, "handover").passed is False
    assert _row(report, "prefill").passed is False


def test_nan_in_a_hidden_state_fails_prefill(spoiled: SpoiledBundle, check: Callable[..., ParityReport]) -> None:
    bias = "layers.0.mlp.down.bias"
    spoiled.set_weight_of(GRAPH, bias, spoiled.weight(bias) * np.nan)
    assert "residual is not finite" in _row(check(spoiled), "prefill").failures[0]


def test_a_chain_that_stops_early_reports_how_far_it_came(
    spoiled: SpoiledBundle, check: Callable[..., ParityReport]
) -> None:
    for table in ROPE:
        spoiled.set_weight_of(GRAPH, table, spoiled.weight(table)[:20])
    report = check(spoiled)
    row = _row(report, "step")
    assert (row.passed, row.steps, row.tokens, row.nll) == (False, 20, 160, None)
    assert any("160 of 256 tokens were compared" in failure for failure in row.failures)
    assert _row(report, "handover").passed is False


def test_one_pass_too_few_is_caught(
    spoiled: SpoiledBundle, check: Callable[..., ParityReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = Decoding.prefill
    monkeypatch.setattr(
        Decoding, "prefill", lambda self, ids, passes, **options: prefill(self, ids, passes - 1, **options)
    )
    assert any("largest |logit error|" in failure for failure in _row(check(spoiled), "prefill").failures)


def test_logits_that_are_not_those_of_the_head_are_inconsistent(
    spoiled: SpoiledBundle, check: Callable[..., ParityReport]
) -> None:
    gain = constant("gain", 1.01, np.float32)
    spoiled.edit(["head"], replace_output("logits", gain, node("Mul", ["before", "gain"], "logits")))
    row = _row(check(spoiled), "prefill")
    assert any("two forms of the same computation" in failure for failure in row.failures)


def test_a_file_that_cannot_be_loaded_is_a_failed_row(
    spoiled: SpoiledBundle, check: Callable[..., ParityReport]
) -> None:
    graph = spoiled.graphs[GRAPH]
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[0].op_type = "Unknown"
    onnx.save(model, graph)
    report = check(spoiled)
    for regime in ("step", "prefill", "handover"):
        row = _row(report, regime)
        assert (row.passed, row.tokens) == (False, 0)
        assert any("ONNX Runtime cannot load it" in failure for failure in row.failures)
    assert not report.passed


@pytest.mark.parametrize("name", ["graphs/prefill_pass.fp32.onnx", "graphs/fp32.weights"])
def test_a_file_that_is_missing_is_no_bundle(spoiled: SpoiledBundle, name: str) -> None:
    spoiled.sign()
    (spoiled.path / name).unlink()
    with pytest.raises(BundleError, match=name):
        validate_bundle(spoiled.path, options=OPTIONS)


def test_a_graph_that_the_target_lacks_is_a_failure(spoiled: SpoiledBundle, check: Callable[..., ParityReport]) -> None:
    manifest = spoiled.manifest
    del manifest["targets"]["ort-cpu-fp32"]["graphs"]["head"]
    spoiled.change_manifest(targets=manifest["targets"])
    report = check(spoiled)
    assert _row(report, "step").passed is True
    assert "has no head graph" in _row(report, "prefill").failures[0]
    assert not report.passed


def test_the_reference_does_not_import_the_exported_wrapper() -> None:
    import ast

    from crt_export.parity import reference

    assert reference.__file__ is not None
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name and name.startswith("crt_export")} == {
        "crt_export.models.base",
        "crt_export.parity.windows",
    }
