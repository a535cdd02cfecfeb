"""What the rows of the corpus level say of a fault in a built ONNX file, how far it came and what is left of it.

Which level catches which fault: ``test_fault_injection.py``.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fault_edits import Edit, constant, replace_output
from onnx import helper, numpy_helper

from crt_export.checkpoint import Checkpoint
from crt_export.parity import Comparison, ParityCase, ParityOptions, ParityReport, check_parity
from crt_export.text import TokenText

LENGTH = 32
OPTIONS = ParityOptions(
    validation_tokens=8 * LENGTH, window=LENGTH, short_reason="fault injection", threads=1, levels=("corpus",)
)
GRAPHS = ("step", "prefill", "prefill_pass", "head")


@pytest.fixture
def built(parity_bundle: Path) -> Path:
    """The four FP32 graphs of a bundle and their weight file."""
    return parity_bundle / "graphs"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "graphs"))


@pytest.fixture
def check(parity_checkpoint: Checkpoint, real_text: TokenText) -> Callable[..., ParityReport]:
    def run(folder: Path, **changes: Any) -> ParityReport:
        case = ParityCase(
            target="ort-cpu-fp32",
            runtime="onnxruntime",
            precision="fp32",
            graphs={name: folder / f"{name}.fp32.onnx" for name in GRAPHS},
            unroll=2,
            cache_dtype="float32",
        )
        return check_parity(parity_checkpoint, [dataclasses.replace(case, **changes)], real_text, options=OPTIONS)

    return run


def _row(report: ParityReport, regime: str) -> Comparison:
    return next(row for row in report.rows if row.target == "ort-cpu-fp32" and row.regime == regime)


def _edit(folder: Path, name: str, edit: Edit) -> None:
    path = folder / f"{name}.fp32.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model)
    onnx.save(model, path)


def _set_weight(name: str, change: Callable[[np.ndarray], np.ndarray], weights: Path) -> Edit:
    """Replace a weight of the shared file by a changed copy inside this graph."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, count = int(place["offset"]), int(place["length"])
        values = np.frombuffer(weights.read_bytes()[start : start + count], np.float32).reshape(tensor.dims)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(values)), name))

    return edit


def test_sound_files_pass_in_every_regime(built: Path, check: Callable[..., ParityReport]) -> None:
    report = check(built, compiled=("step", "prefill"), runtime="tensorrt-rtx")
    assert report.passed, report.failures
    rows = [row for row in report.rows if row.target == "ort-cpu-fp32"]
    assert [row.regime for row in rows if row.status == "run"] == [
        "step", "prefill", "prefill_pass", "handover", "regime-gap",
    ]  # fmt: skip
    assert [(row.runtime, row.passed, row.nll) for row in rows if row.status == "compiled"] == [
        ("tensorrt-rtx", None, None)
    ] * 2
    step, handover = _row(report, "step"), _row(report, "handover")
    assert (step.tokens, step.steps, handover.tokens, handover.steps) == (256, 32, 8 * 17, 16)
    assert step.value("max_abs_logit_error") is not None
    assert 0 < (step.value("max_abs_logit_error") or 0) < 1e-5
    assert _row(report, "prefill_pass").value("regime_consistency") is not None
    assert any("second half of each window" in note and "136 of 256 tokens" in note for note in report.notes)


def test_a_model_worse_than_chance_is_noted(built: Path, check: Callable[..., ParityReport]) -> None:
    report = check(built)
    ungated = [row for row in report.rows if row.better_than_chance is False]
    assert ungated, "a random model does not fit the text"
    assert any(f"not gated in {len(ungated)} rows" in note for note in report.notes)


def test_windows_in_small_batches_give_the_same_figures(
    built: Path, parity_checkpoint: Checkpoint, real_text: TokenText, check: Callable[..., ParityReport]
) -> None:
    whole = _row(check(built), "handover")
    case = ParityCase(
        target="ort-cpu-fp32", runtime="onnxruntime", precision="fp32", unroll=2, cache_dtype="float32",
        graphs={name: built / f"{name}.fp32.onnx" for name in GRAPHS},
    )  # fmt: skip
    parts = check_parity(parity_checkpoint, [case], real_text, options=dataclasses.replace(OPTIONS, window_batch=3))
    assert _row(parts, "handover").nll == pytest.approx(whole.nll, abs=1e-6)
    assert _row(parts, "handover").tokens == whole.tokens


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
        ("step", _rename, "step", "output logits: float32 [batch, 256] expected, nothing"),
        ("head", _cut(0), "prefill", "nothing was compared"),
        ("head", _cut(0), "prefill", "head: logits are float32 [8, 0, 256], expected float32 [8, 32, 256]"),
        ("step", _cut(-1), "step", "ONNX Runtime failed in step.fp32.onnx"),
        ("prefill", _nan_logits, "prefill", "prefill: logits are NaN or infinite"),
        ("prefill", _nan_logits, "handover", "prefill: logits are NaN or infinite"),
        ("prefill_pass", _nan_logits, "prefill_pass", "prefill_pass: logits are NaN or infinite"),
        ("step", _stop_position, "step", "next_position is 0 after token 0, expected 1"),
        ("step", _wrong_token, "step", "next_token after token 0 is not the argmax"),
    ],
)
def test_a_fault_in_a_file_fails_its_row(
    copy: Path, check: Callable[..., ParityReport], graph: str, edit: Edit, regime: str, sentence: str
) -> None:
    _edit(copy, graph, edit)
    report = check(copy)
    row = _row(report, regime)
    assert not report.passed
    assert row.passed is False
    assert any(sentence in failure for failure in row.failures), row.failures


def test_nan_weight_fails_every_regime_that_runs_it(copy: Path, check: Callable[..., ParityReport]) -> None:
    weights = copy / "fp32.weights"
    _edit(copy, "step", _set_weight("final_norm.bias", lambda values: values * np.nan, weights))
    report = check(copy)
    assert "NaN or infinite, first in window 0 at position 0" in _row(report, "step").failures[0]
    assert _row(report, "step").nll is None
    assert _row(report, "handover").passed is False
    assert _row(report, "prefill").passed is True


def test_nan_in_a_hidden_state_fails_prefill(copy: Path, check: Callable[..., ParityReport]) -> None:
    weights = copy / "fp32.weights"
    _edit(copy, "prefill", _set_weight("layers.0.mlp.down.bias", lambda values: values * np.nan, weights))
    assert "prefill: residual is NaN" in _row(check(copy), "prefill").failures[0]


def test_a_chain_that_stops_early_reports_how_far_it_came(copy: Path, check: Callable[..., ParityReport]) -> None:
    for table in ("rope_cos", "rope_sin"):
        _edit(copy, "step", _set_weight(table, lambda values: values[:20], copy / "fp32.weights"))
    report = check(copy)
    row = _row(report, "step")
    assert (row.passed, row.steps, row.tokens, row.nll) == (False, 20, 160, None)
    assert any("160 of 256 tokens were compared" in failure for failure in row.failures)
    assert _row(report, "handover").passed is False


def test_one_pass_too_few_is_caught(copy: Path, check: Callable[..., ParityReport]) -> None:
    shutil.copyfile(copy / "prefill_pass.fp32.onnx", copy / "prefill.fp32.onnx")
    report = check(copy)
    assert any("largest |logit error|" in failure for failure in _row(report, "prefill").failures)
    assert any("two forms of the same computation" in failure for failure in _row(report, "prefill_pass").failures)


@pytest.mark.parametrize("fault", ["missing", "truncated", "weights missing"])
def test_a_file_that_cannot_be_loaded_is_a_failed_row(
    copy: Path, check: Callable[..., ParityReport], fault: str
) -> None:
    step = copy / "step.fp32.onnx"
    if fault == "missing":
        step.unlink()
    elif fault == "truncated":
        step.write_bytes(step.read_bytes()[:1000])
    else:
        (copy / "fp32.weights").unlink()
    report = check(copy)
    assert (_row(report, "step").passed, _row(report, "step").tokens) == (False, 0)
    assert not report.passed


def test_a_graph_that_the_target_lacks_is_a_failure(built: Path, check: Callable[..., ParityReport]) -> None:
    report = check(built, graphs={"step": built / "step.fp32.onnx"})
    assert _row(report, "step").passed is True
    assert "has no prefill graph" in _row(report, "prefill").failures[0]
    assert not report.passed


def test_the_reference_does_not_import_the_exported_wrapper() -> None:
    import ast

    from crt_export.parity import reference

    assert reference.__file__ is not None
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name and name.startswith("crt_export")} == {
        "crt_export.model",
        "crt_export.parity.windows",
    }
