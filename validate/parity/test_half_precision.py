"""FP16: what ONNX Runtime's FP32 arithmetic hides must still be seen."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from loose_runner import loose_runner
from onnx import TensorProto, helper, numpy_helper

from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.errors import ContractError
from crt_export.graph.export import GraphExporter
from crt_export.graph.passes.decompose_attention import decompose_attention
from crt_export.graph.passes.fix_capacity import fix_capacity
from crt_export.graph.weights import write_graph, write_weights
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity import Comparison, ParityCase, ParityOptions, ParityReport, check_parity, load_tolerances
from crt_export.parity.half import compare_half
from crt_export.parity.headroom import observe_fp16
from crt_export.parity.reference import Reference
from crt_export.parity.windows import windows_from_text
from crt_export.progress import no_progress
from crt_export.quantize.calibration import CalibrationOptions, calibrate, calibration_windows
from crt_export.quantize.plan import W8A8Plan, plan_w8a8
from crt_export.text import TokenText

OPTIONS = ParityOptions(validation_tokens=128, window=16, short_reason="overflow test", threads=1)
CAPACITY = 24


@pytest.fixture(scope="module")
def built(parity_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step, prefill (one pass) and head in FP16 as a TensorRT target has them: capacity fixed, attention decomposed."""
    folder = tmp_path_factory.mktemp("built")
    model = model_from_checkpoint(parity_checkpoint, torch.float16)
    exporter = GraphExporter(model)
    graphs = {name: exporter.graph(name) for name in ("step", "prefill_pass", "head")}
    for name in ("step", "prefill_pass"):
        fix_capacity(graphs[name], CAPACITY)
    decompose_attention(graphs["prefill_pass"])
    weights = write_weights(graphs, folder / "fp16.weights")
    for name, graph in graphs.items():
        write_graph(graph, folder / f"{name}.onnx", weights)
    return folder


@pytest.fixture
def check(parity_checkpoint: Checkpoint, real_text: TokenText) -> Callable[..., ParityReport]:
    def run(folder: Path, *, without: str = "", precision: str = "fp16", plan: W8A8Plan | None = None) -> ParityReport:
        # With K = 1 the prefill is the pass.
        graphs = {
            name: folder / f"{'prefill_pass' if name == 'prefill' else name}.onnx"
            for name in ("step", "prefill", "prefill_pass", "head")
            if name != without
        }
        config = parity_checkpoint.config
        case = ParityCase(
            target="rtx-sm80-fp16",
            runtime="tensorrt-rtx",
            precision=precision,
            graphs=graphs,
            opener=lambda threads: loose_runner(graphs, config, precision, unroll=1, capacity=CAPACITY),
            unroll=1,
            cache_dtype="float16",
            capacity=CAPACITY,
            residual_dtype="float16",
            compiled=("step", "prefill"),
            plan=plan,
        )
        return check_parity(parity_checkpoint, [case], real_text, options=OPTIONS)

    return run


def _row(report: ParityReport, regime: str, target: str = "rtx-sm80-fp16") -> Comparison:
    return next(row for row in report.rows if row.target == target and row.regime == regime)


def _replace_bias(path: Path, name: str, value: float) -> None:
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), value, np.float16), name))
    onnx.save(model, path)


def test_sound_files_pass_and_say_what_kind_of_evidence_it_is(built: Path, check: Callable[..., ParityReport]) -> None:
    report = check(built)
    assert report.passed, report.failures
    step, half = _row(report, "step"), _row(report, "step", "pytorch-half")
    assert (step.runtime, step.arithmetic, step.passed) == ("onnxruntime", "fp32-emulated", True)
    assert (half.runtime, half.arithmetic, half.passed) == ("pytorch-half", "fp16", True)
    compiled = [row for row in report.rows if row.status == "compiled"]
    assert [(row.graph, row.runtime, row.passed, row.nll) for row in compiled] == [
        ("step", "tensorrt-rtx", None, None),
        ("prefill", "tensorrt-rtx", None, None),
    ]
    for regime in ("step", "prefill"):
        largest = _row(report, regime).value("fp16_headroom")
        assert largest is not None
        assert 1 < largest < 100
        level = report.result("rtx-sm80-fp16", "corpus")
        assert level is not None
        assert len(level.data["largest_fp16"][regime]) == 16


@pytest.mark.parametrize("graph", ["step", "prefill_pass"])
def test_an_overflow_that_the_cpu_hides_fails(
    built: Path, tmp_path: Path, check: Callable[..., ParityReport], graph: str
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "graphs"))
    # GELU(30000) = 30000, and 32 of them times the down weights leave the FP16 range.
    _replace_bias(folder / f"{graph}.onnx", "layers.0.mlp.up.bias", 30000.0)
    row = _row(check(folder), "step" if graph == "step" else "prefill")
    assert row.passed is False
    largest = row.value("fp16_headroom")
    assert largest is None or largest > 29000
    assert any("the limit is 16376" in failure for failure in row.failures), row.failures


def test_a_missing_graph_fails_with_its_sentence(built: Path, check: Callable[..., ParityReport]) -> None:
    row = _row(check(built, without="prefill"), "prefill")
    assert row.passed is False
    assert "this target has no prefill graph" in row.failures[0]


def test_nan_counts_as_infinite(built: Path, tmp_path: Path, check: Callable[..., ParityReport]) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "graphs"))
    _replace_bias(folder / "step.onnx", "layers.0.attn.v.bias", np.nan)
    failures = _row(check(folder), "step").failures
    assert any("reaches inf" in failure for failure in failures), failures


def test_a_mask_fill_and_a_cache_are_not_mistaken_for_activations(built: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(built / "prefill_pass.onnx", load_external_data=False))
    kinds = {name: node.op_type for node in model.graph.node for name in node.output}
    observed = observe_fp16(model)
    assert not {kinds[name] for name in observed.tensors} & {"TensorScatter", "Softmax", "Where"}
    assert any(name.endswith("scores_output") for name in observed.tensors)


def test_scores_inside_a_fused_attention_are_bounded_by_norms(built: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(built / "step.onnx", load_external_data=False))
    observed = observe_fp16(model)
    assert [scale for _, scale in observed.scores] == [pytest.approx(0.5)] * 2  # head_dim 4, two layers
    values = np.ones(observed.count, np.float32)
    values[-2:] = 3.0, 5.0
    assert list(observed.largest(values).values())[-1] == pytest.approx(7.5)


def test_a_graph_without_fp16_is_refused_as_evidence() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", [value], [result])
    with pytest.raises(ContractError, match="no tensor is FP16"):
        observe_fp16(helper.make_model(graph))


def _half(checkpoint: Checkpoint, text: TokenText, plan: W8A8Plan | None = None) -> Comparison:
    windows = windows_from_text(text, OPTIONS, longest=64, longest_reason="")
    reference = Reference(model_from_checkpoint(checkpoint), windows, batch=8)
    return compare_half(checkpoint, reference, "float16", load_tolerances(), no_progress, plan=plan)[0]


@pytest.fixture(scope="module")
def plan(parity_checkpoint: Checkpoint, train_text: Path) -> W8A8Plan:
    model, options = model_from_checkpoint(parity_checkpoint), CalibrationOptions(windows=64, minimum_tokens=512)
    tokens = np.frombuffer(train_text.read_bytes(), np.uint8).astype(np.int64)
    windows = calibration_windows(tokens, seq=16, options=options)
    return plan_w8a8(model, calibrate(model, windows, unroll=2, options=options))


def test_w8a8_runs_in_real_half_arithmetic_under_its_own_gate(
    parity_checkpoint: Checkpoint, real_text: TokenText, plan: W8A8Plan
) -> None:
    row = _half(parity_checkpoint, real_text, plan)
    assert (row.precision, row.arithmetic, row.tokens) == ("w8a8", "int8-emulated+fp16", 128)
    assert row.passed, row.failures
    fp16 = _half(parity_checkpoint, real_text)
    error = row.value("relative_logit_error")
    assert error is not None
    assert fp16.value("relative_logit_error") is not None
    assert error > 3 * (fp16.value("relative_logit_error") or 0), "nothing was quantised"


def test_a_wrong_w8a8_scale_fails_the_half_precision_chain(
    parity_checkpoint: Checkpoint, real_text: TokenText, plan: W8A8Plan
) -> None:
    head = dataclasses.replace(plan.inputs["lm_head"], scale=plan.inputs["lm_head"].scale * np.float32(0.5))
    wrong = W8A8Plan(inputs={**plan.inputs, "lm_head": head})
    assert _half(parity_checkpoint, real_text, wrong).passed is False


def test_a_w8a8_target_gets_its_half_precision_row_and_has_a_plan(
    built: Path, check: Callable[..., ParityReport], plan: W8A8Plan
) -> None:
    rows = [row.precision for row in check(built, precision="w8a8", plan=plan).rows if row.target == "pytorch-half"]
    assert rows == ["fp16", "w8a8"]
    with pytest.raises(ContractError, match="expected a plan for w8a8 and none for others, found no plan for w8a8"):
        check(built, precision="w8a8")


def test_real_half_arithmetic_overflows_and_fails(make_checkpoint: Callable[..., Path], real_text: TokenText) -> None:
    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        # Every weight fits into FP16; the sum of 64 GELU outputs of 60000 does not.
        tensors["layers.0.mlp.up.bias"].fill_(60000.0)
        tensors["layers.0.mlp.down.weight"].fill_(1.0)

    row = _half(load_checkpoint(make_checkpoint(num_hidden_layers=1, edit=overflow)), real_text)
    assert (row.passed, row.nll) == (False, None)
    assert "logits are NaN or infinite" in row.failures[0]


def test_weights_beyond_fp16_fail_by_name(make_checkpoint: Callable[..., Path], real_text: TokenText) -> None:
    name = "layers.0.mlp.down.bias"
    row = _half(load_checkpoint(make_checkpoint(edit=lambda tensors: tensors[name].fill_(70000.0))), real_text)
    assert row.passed is False
    assert name in row.failures[0]
    assert "weights beyond the largest float16 value" in row.failures[0]
