"""L0: what is wrong with a file is found without running it, by the sentence that names it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from contract_edits import (
    Edit,
    add_output,
    both_ways,
    constant_output,
    dead_reader,
    drop_a_product,
    exchange_parts,
    foreign_operator,
    half_state,
    hidden_weight,
    move,
    older_opset,
    other_axis,
    part_unread,
    rename_output,
    swap,
    swap_updates,
)
from onnx import helper, numpy_helper
from safetensors.numpy import load, save
from short_setup import short_setup

from crt_export.checkpoint import Checkpoint
from crt_export.graph.export import GraphExporter
from crt_export.graph.weights import write_graph, write_weights
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity import ParityCase, ParityOptions
from crt_export.parity.contract import check_contract_level
from crt_export.parity.report import LevelResult
from crt_export.parity.setup import ParitySetup
from crt_export.quantize.calibration import CalibrationOptions, calibrate, calibration_windows
from crt_export.quantize.plan import W8A8Plan, plan_w8a8, quantize_linears, read_plan
from crt_export.quantize.w8 import quantize_w8
from crt_export.quantize.w8a8 import quantize_w8a8
from crt_export.text import TokenText

LENGTH = 32
GRAPHS = ("step", "prefill", "prefill_pass", "head")
FORMS = ("fp32", "fp16", "w8", "w8a8")


@pytest.fixture(scope="session")
def setup(parity_checkpoint: Checkpoint, real_text: TokenText) -> ParitySetup:
    options = ParityOptions(validation_tokens=8 * LENGTH, window=LENGTH, short_reason="a test of levels", threads=1)
    return short_setup(parity_checkpoint, real_text, options)


@pytest.fixture(scope="session")
def plan(parity_checkpoint: Checkpoint, real_text: TokenText) -> W8A8Plan:
    model = model_from_checkpoint(parity_checkpoint)
    options = CalibrationOptions(windows=32, minimum_tokens=512)
    windows = calibration_windows(real_text.ids, seq=16, options=options)
    return plan_w8a8(model, calibrate(model, windows, unroll=2, options=options))


@pytest.fixture(scope="session")
def forms(
    parity_bundle: Path, parity_checkpoint: Checkpoint, plan: W8A8Plan, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``step`` and ``head`` in every precision; only FP16 is exported for it."""
    folder = tmp_path_factory.mktemp("forms")
    exporter = GraphExporter(model_from_checkpoint(parity_checkpoint, torch.float16))
    made: dict[str, dict[str, ir.Model]] = {form: {} for form in FORMS}
    for name in ("step", "head"):
        made["fp32"][name] = ir.load(parity_bundle / "graphs" / f"{name}.fp32.onnx")
        made["w8"][name] = made["fp32"][name].clone()
        quantize_w8(made["w8"][name])
        made["fp16"][name] = exporter.graph(name)
        made["w8a8"][name] = made["fp16"][name].clone()
        quantize_w8a8(made["w8a8"][name], quantize_linears(model_from_checkpoint(parity_checkpoint), plan))
    (folder / "plan").write_bytes(plan.to_bytes())
    for form, models in made.items():
        weights = write_weights(models, folder / f"{form}.weights")
        for name, model in models.items():
            write_graph(model, folder / f"{name}.{form}.onnx", weights)
    return folder


def _case(folder: Path, checkpoint: Checkpoint, form: str = "fp32", runtime: str = "onnxruntime") -> ParityCase:
    half = form in ("fp16", "w8a8")
    files = {name: folder / f"{name}.{form}.onnx" for name in GRAPHS}
    return ParityCase(
        target=f"test-{form}",
        runtime=runtime,
        precision=form,
        graphs={name: path for name, path in files.items() if path.is_file()},
        unroll=2,
        cache_dtype="float16" if half else "float32",
        plan=read_plan(folder / "plan", checkpoint.config) if form == "w8a8" else None,
    )


def _failures(result: LevelResult, graph: str) -> list[str]:
    return [failure for failure in result.failures if failure.startswith(f"{graph}:")]


def _edit(folder: Path, name: str, edit: Edit, form: str = "fp32") -> None:
    path = folder / f"{name}.{form}.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model)
    onnx.save(model, path)


@pytest.mark.parametrize("form", FORMS)
def test_sound_files_pass_in_every_precision(forms: Path, setup: ParitySetup, form: str) -> None:
    result = check_contract_level(_case(forms, setup.checkpoint, form), setup)
    assert [*_failures(result, "step"), *_failures(result, "head")] == []
    assert "prefill: file: target" in "\n".join(result.failures), "a missing graph is a failure of its own"
    facts = result.data["graphs"]["step"]
    assert facts["external_files"] == [f"{form}.weights"]
    assert facts["weights_checked"] >= len(setup.checkpoint.tensors)
    product, of_a_layer = ("com.microsoft::MatMulNBits", 4) if form == "w8" else ("MatMul", 6)
    assert facts["operators"][product] == 2 * of_a_layer + 2 + 1


def test_the_whole_bundle_passes(parity_bundle: Path, setup: ParitySetup) -> None:
    result = check_contract_level(_case(parity_bundle / "graphs", setup.checkpoint), setup)
    assert result.passed, result.failures
    claims = {"interface", "operators", "external data", "data flow", "caches", "linears", "weights"}
    assert {check.name for check in result.checks} >= {f"{name}: {claim}" for name in GRAPHS for claim in claims}
    assert set(result.data["graphs"]) == set(GRAPHS)


@pytest.mark.parametrize(
    ("graph", "edit", "sentence"),
    [
        ("step", rename_output, "interface: output logits: float32 [batch, 256] expected, nothing found"),
        ("step", rename_output, "interface: output scores: float32 [batch, 256] found, which is not part of the contr"),
        ("head", add_output, "interface: output debug: float32 [batch, 256] found, which is not part of the contract"),
        (
            "step",
            half_state,
            "interface: input state: float32 [batch, 1, 16] expected, state: float16 [batch, 1, 16] found",
        ),
        ("step", foreign_operator, "operators: operator com.example::FusedGelu (1 nodes, such as foreign)"),
        ("step", foreign_operator, "operators: opset of com.example: expected none, found 3"),
        ("step", older_opset, "operators: opset of ai.onnx: expected 24, found 23"),
        ("step", move("/etc/passwd"), "external data: tensor embed.weight points at '/etc/passwd', which is an abs"),
        ("step", move("../fp32.weights"), "external data: tensor embed.weight points at '../fp32.weights', which"),
        ("prefill_pass", swap({"hidden": "state"}), "data flow: input hidden is read by no node"),
        ("prefill_pass", dead_reader, "data flow: input hidden is read only by nodes that no output depends on"),
        ("step", constant_output, "data flow: output next_position is computed by no node: it is a constant"),
        (
            "step",
            swap(both_ways("past_key_values.0.key", "past_key_values.1.key")),
            "caches: output present_key_values.0.key continues past_key_values.1.key, expected past_key_values.0.key",
        ),
        (
            "step",
            swap(both_ways("present_key_values.0.value", "present_key_values.1.value"), outputs=True),
            "caches: output present_key_values.1.value continues past_key_values.0.value",
        ),
        (
            "step",
            swap_updates,
            "caches: output present_key_values.0.value stores what layers.1.attn.v computes, expected layers.0.attn.v",
        ),
        (
            "prefill_pass",
            swap(both_ways("rope_cos", "rope_sin")),
            "data flow: RotaryEmbedding node_rotary_embedding rotates by rows of rope_sin, rope_cos, expected rope_cos",
        ),
        ("prefill", drop_a_product, "linears: layers.1.mlp.up multiplies 1 times, expected 2"),
        (
            "step",
            swap(both_ways("layers.0.attn.q.weight", "layers.0.attn.k.weight")),
            "caches: output present_key_values.0.key stores what layers.0.attn.q computes",
        ),
        ("step", hidden_weight, "weights: constant extra of 256 values is no weight of the checkpoint"),
    ],
)
def test_a_fault_in_a_file_is_named(graphs: Path, setup: ParitySetup, graph: str, edit: Edit, sentence: str) -> None:
    _edit(graphs, graph, edit)
    result = check_contract_level(_case(graphs, setup.checkpoint), setup)
    assert result.passed is False
    found = _failures(result, graph)
    assert any(failure.startswith(f"{graph}: {sentence}") for failure in found), found
    others = [failure for failure in result.failures if not failure.startswith(f"{graph}:")]
    assert others == [], "the other graphs are sound"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (exchange_parts, "caches: output present_key_values.0.key stores what layers.0.attn.q computes"),
        (part_unread, "is not split into 3 parts along the last axis, all of them read"),
        (other_axis, "is not split into 3 parts along the last axis, all of them read"),
        (
            swap(both_ways("layers.0.attn.qkv.bias", "layers.1.attn.qkv.bias")),
            "is not followed by an Add of layers.0.attn.qkv.bias",
        ),
    ],
)
def test_a_fault_in_a_product_of_three_linears_is_named(
    forms: Path, setup: ParitySetup, tmp_path: Path, edit: Edit, sentence: str
) -> None:
    folder = Path(shutil.copytree(forms, tmp_path / "forms"))
    _edit(folder, "step", edit, "w8")
    found = _failures(check_contract_level(_case(folder, setup.checkpoint, "w8"), setup), "step")
    assert any(sentence in failure for failure in found), found


def test_one_pass_too_few_is_counted(graphs: Path, setup: ParitySetup) -> None:
    shutil.copyfile(graphs / "prefill_pass.fp32.onnx", graphs / "prefill.fp32.onnx")
    found = _failures(check_contract_level(_case(graphs, setup.checkpoint), setup), "prefill")
    assert "prefill: linears: 1 passes are unrolled, expected 2" in found


def test_an_operator_of_another_runtime_is_refused(forms: Path, setup: ParitySetup) -> None:
    result = check_contract_level(_case(forms, setup.checkpoint, "w8", "tensorrt-rtx"), setup)
    found = _failures(result, "head")
    assert any("operator com.microsoft::MatMulNBits (1 nodes" in failure for failure in found), found
    assert any("opset of com.microsoft: expected none, found 1" in failure for failure in found), found


def test_weights_that_lie_elsewhere_are_not_opened(graphs: Path, setup: ParitySetup, tmp_path: Path) -> None:
    outside = tmp_path / "outside.weights"
    shutil.copyfile(graphs / "fp32.weights", outside)
    _edit(graphs, "step", move(str(outside)))
    found = _failures(check_contract_level(_case(graphs, setup.checkpoint), setup), "step")
    assert "step: weights: not read: the external data must lie beside the graph" in found


def test_a_short_weight_file_fails_the_weights(graphs: Path, setup: ParitySetup) -> None:
    weights = graphs / "fp32.weights"
    weights.write_bytes(weights.read_bytes()[:4096])
    result = check_contract_level(_case(graphs, setup.checkpoint), setup)
    assert {check.name for check in result.checks if not check.passed} == {f"{name}: weights" for name in GRAPHS}


def _in_place(folder: Path, form: str, tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change a tensor in the weight file that all graphs of a precision share, or inside each graph."""
    for name in ("step", "head"):
        path = folder / f"{name}.{form}.onnx"
        model = onnx.load(path, load_external_data=False)
        for found in (found for found in model.graph.initializer if found.name == tensor):
            if not found.external_data:
                found.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found)), tensor))
                continue
            place = {entry.key: entry.value for entry in found.external_data}
            weights = folder / f"{form}.weights"
            data = bytearray(weights.read_bytes())
            start, count = int(place["offset"]), int(place["length"])
            dtype = helper.tensor_dtype_to_np_dtype(found.data_type)
            values = np.frombuffer(bytes(data[start : start + count]), dtype)
            data[start : start + count] = change(values).astype(dtype).tobytes()
            weights.write_bytes(bytes(data))
            onnx.save(model, path)
            return
        onnx.save(model, path)


def _one_percent(values: np.ndarray) -> np.ndarray:
    return values * np.asarray(1.01, np.float32)


def _one_level(values: np.ndarray) -> np.ndarray:
    """One weight one quantisation step towards the middle of the range."""
    changed = values.copy()
    level = int(changed.flat[3])
    changed.flat[3] = level + 1 if level < 100 else level - 1
    return changed


def _last(count: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Change the last values only."""
    return lambda values: np.concatenate([values[:-count], change(values[-count:])])


@pytest.mark.parametrize(
    ("form", "tensor", "change", "sentence"),
    [
        ("fp32", "layers.0.attn.o.weight", _one_percent, "layers.0.attn.o.weight: 256 of 256 values differ"),
        ("fp32", "embed.weight", _one_percent, "embed.weight: 4096 of 4096 values differ"),
        ("fp32", "rope_cos", _one_percent, "rope_cos: differs from what position x frequency gives"),
        ("fp16", "layers.1.mlp.down.weight", _one_percent, "layers.1.mlp.down.weight: "),
        ("fp16", "layers.1.mlp_norm.bias", _one_percent, "layers.1.mlp_norm.bias: "),
        ("w8", "layers.0.mlp.up.weight_scales", _one_percent, "weight layers.0.mlp.up: value"),
        ("w8", "layers.0.mlp.up.weight_blocks", _one_level, "weight layers.0.mlp.up: value"),
        ("w8", "layers.0.attn_norm.weight", _one_percent, "layers.0.attn_norm.weight: 16 of 16 values differ"),
        ("w8", "layers.0.attn_norm.weight", lambda gain: gain * 2, "layers.0.attn_norm.bias: 16 of 16 values differ"),
        ("w8", "layers.0.attn.qkv.bias", _last(16, _one_percent), "layers.0.attn.qkv.bias: 16 of 48 values differ"),
        ("w8", "layers.1.attn.qkv.weight_scales", _last(16, _one_percent), "weight layers.1.attn.v: value"),
        ("w8", "layers.1.attn.qkv.weight_blocks", _one_level, "weight layers.1.attn.q: value"),
        ("w8a8", "layers.1.attn.v.weight_scale", _one_percent, "weight layers.1.attn.v: value"),
        ("w8a8", "layers.1.attn.o.weight_q", _one_level, "weight layers.1.attn.o: value"),
        ("w8a8", "layers.1.attn.v.bias_fp32", _one_percent, "layers.1.attn.v.bias_fp32: 16 of 16 values differ"),
        ("w8a8", "layers.0.mlp.down.bias_fp32", _one_percent, "layers.0.mlp.down.bias_fp32: 16 of 16 values differ"),
        (
            "w8a8",
            "layers.0.mlp.down.input_shift",
            _one_percent,
            "layers.0.mlp.down.input_shift: 1 of 1 values differ from the plan's",
        ),
        ("w8a8", "final_norm.bias", _one_percent, "final_norm.bias: 16 of 16 values differ"),
    ],
)
def test_a_weight_off_by_one_per_cent_is_found(
    forms: Path, setup: ParitySetup, tmp_path: Path, form: str, tensor: str, change: Callable, sentence: str
) -> None:
    folder = Path(shutil.copytree(forms, tmp_path / "forms"))
    _in_place(folder, form, tensor, change)
    result = check_contract_level(_case(folder, setup.checkpoint, form), setup)
    failures = [*_failures(result, "step")]
    assert any(sentence in failure for failure in failures), failures
    assert all(failure.startswith("step: weights: ") for failure in failures), failures


@pytest.mark.parametrize("form", ["w8", "w8a8"])
def test_the_rounding_of_int8_weights_is_held_to_its_tolerance(forms: Path, setup: ParitySetup, form: str) -> None:
    tight = dataclasses.replace(setup, tolerances=dataclasses.replace(setup.tolerances, weight_rounding=0.3))
    for given, passed in ((setup, True), (tight, False)):
        result = check_contract_level(_case(forms, setup.checkpoint, form), given)
        check = next(check for check in result.checks if check.name == "head: weights")
        assert (check.passed, check.limit) == (passed, given.tolerances.weight_rounding)
        assert check.tolerance == "shared.weight_rounding"


def test_an_activation_scale_of_its_own_in_one_graph_is_found(forms: Path, setup: ParitySetup, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(forms, tmp_path / "forms"))

    def edit(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "lm_head.input_scale")
        tensor.CopyFrom(numpy_helper.from_array(_one_percent(numpy_helper.to_array(tensor)), tensor.name))

    _edit(folder, "head", edit, "w8a8")
    found = _failures(check_contract_level(_case(folder, setup.checkpoint, "w8a8"), setup), "head")
    assert len(found) == 1
    assert "lm_head.input_scale: 1 of 1 values differ from the plan's" in found[0]


@pytest.mark.parametrize(
    ("tensor", "change", "sentence"),
    [
        ("layers.1.attn.qkv.factor", lambda factor: factor * 2, "layers.1.attn_norm.weight: 16 of 16 values differ"),
        ("layers.1.attn.o.factor", _last(1, lambda factor: factor / 2), "layers.1.attn.v.bias_fp32: 1 of 16 values"),
        ("layers.1.mlp.down.factor", lambda factor: factor * 2, "weight layers.1.mlp.down: value"),
        ("layers.0.mlp.down.input_shift", _one_percent, "layers.0.mlp.down.input_shift: 1 of 1 values differ from the"),
        (
            "layers.0.mlp.up.input_scale",
            _one_percent,
            "layers.0.mlp.up.input_scale: 1 of 1 values differ from the plan",
        ),
    ],
)
def test_a_fault_in_the_plan_is_found(
    forms: Path, setup: ParitySetup, tmp_path: Path, tensor: str, change: Callable, sentence: str
) -> None:
    folder = Path(shutil.copytree(forms, tmp_path / "forms"))
    tensors = load((folder / "plan").read_bytes())
    tensors[tensor] = np.asarray(change(tensors[tensor]), np.float32)
    (folder / "plan").write_bytes(save(tensors))
    failures = _failures(check_contract_level(_case(folder, setup.checkpoint, "w8a8"), setup), "step")
    assert any(sentence in failure for failure in failures), failures
    assert all(failure.startswith("step: weights: ") for failure in failures), failures


def test_a_shift_that_the_plan_has_not_is_found(forms: Path, setup: ParitySetup, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(forms, tmp_path / "forms"))

    def edit(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(0.5, np.float32), "lm_head.input_shift"))

    _edit(folder, "head", edit, "w8a8")
    found = _failures(check_contract_level(_case(folder, setup.checkpoint, "w8a8"), setup), "head")
    assert any("lm_head.input_shift is no range of the plan" in failure for failure in found), found
