"""L2: a sound target passes, and a fault in its step graph is named by tensor, step and window."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from crt_export.checkpoint import Checkpoint
from crt_export.model import model_from_checkpoint
from crt_export.parity.case import ParityCase
from crt_export.parity.chain import check_chain
from crt_export.parity.chain_errors import ChainErrors, ChainText
from crt_export.parity.chain_run import TargetChain
from crt_export.parity.level import Check, LevelResult, ParitySetup
from crt_export.parity.reference import Reference
from crt_export.parity.tolerances import load_tolerances
from crt_export.parity.windows import ParityOptions, windows_from_text
from crt_export.progress import no_progress
from crt_export.text import TokenText

LENGTH, STEPS, WINDOWS = 24, 16, 3
OPTIONS = ParityOptions(
    validation_tokens=6 * LENGTH,
    window=LENGTH,
    short_reason="fault injection",
    threads=1,
    chain_windows=WINDOWS,
    chain_steps=STEPS,
)
Edit = Callable[[onnx.ModelProto], object]
Run = Callable[..., LevelResult]


@pytest.fixture
def setup(parity_checkpoint: Checkpoint, real_text: TokenText) -> ParitySetup:
    windows = windows_from_text(real_text, OPTIONS, longest=LENGTH, longest_reason="the test")
    return ParitySetup(
        checkpoint=parity_checkpoint,
        reference=Reference(model_from_checkpoint(parity_checkpoint), windows, batch=4),
        text=real_text,
        options=OPTIONS,
        tolerances=load_tolerances(),
        progress=no_progress,
    )


@pytest.fixture
def case(graphs: Path, parity_checkpoint: Checkpoint) -> ParityCase:
    return ParityCase(
        target="ort-cpu-fp32",
        runtime="onnxruntime",
        precision="fp32",
        graphs={name: graphs / f"{name}.fp32.onnx" for name in ("step", "prefill", "prefill_pass", "head")},
        unroll=2,
        cache_dtype="float32",
    )


def check_of(result: LevelResult, name: str) -> Check:
    return next(check for check in result.checks if check.name == name)


def edit_graph(case: ParityCase, name: str, edit: Edit) -> None:
    model = onnx.load(case.graphs[name], load_external_data=False)
    edit(model)
    onnx.save(model, case.graphs[name])


def on_output(name: str, *parts: onnx.NodeProto | onnx.TensorProto) -> Edit:
    """Nodes between what computes an output and the output; they and all others read ``before``."""

    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = ["before" if value == name else value for value in node.output]
            node.input[:] = ["before" if value == name else value for value in node.input]
        add(model, *parts)

    return edit


def on_input(name: str, result: str, operator: str, *parts: onnx.NodeProto | onnx.TensorProto) -> Edit:
    """Let the nodes of one kind read ``result`` instead of an input."""

    def edit(model: onnx.ModelProto) -> None:
        readers = [node for node in model.graph.node if node.op_type == operator and name in node.input]
        assert readers
        for node in readers:
            node.input[:] = [result if value == name else value for value in node.input]
        add(model, *parts)

    return edit


def add(model: onnx.ModelProto, *parts: onnx.NodeProto | onnx.TensorProto) -> None:
    """Constants, and nodes in front of all others, or behind them where they read ``before``."""
    model.graph.initializer.extend(part for part in parts if isinstance(part, onnx.TensorProto))
    nodes = [part for part in parts if isinstance(part, onnx.NodeProto)]
    first = not any("before" in node.input for node in nodes)
    old = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *old] if first else [*old, *nodes])


def constant(name: str, value: object, dtype: type = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def where_position_is(position: int, value: object, kept: str, result: str) -> list[onnx.NodeProto | onnx.TensorProto]:
    """``result`` is ``value`` in the rows at one position and ``kept`` elsewhere."""
    axes = [1] if result == "logits" else [1, 2]
    return [
        constant("wanted", position),
        constant("axes", axes),
        constant("value", value, np.float32),
        helper.make_node("Equal", ["position", "wanted"], ["here"]),
        helper.make_node("Unsqueeze", ["here", "axes"], ["rows"]),
        helper.make_node("Where", ["rows", "value", kept], [result]),
    ]


NAN_AT_FIVE = on_output("logits", *where_position_is(5, np.nan, "before", "logits"))
NO_STATE = on_input(
    "state",
    "no_state",
    "Add",
    constant("zero", 0, np.float32),
    helper.make_node("Mul", ["state", "zero"], ["no_state"]),
)
STALE_STATE = on_input("state", "kept", "Add", *where_position_is(0, np.linspace(-1, 1, 16), "state", "kept"))
NEXT_SLOT = on_input(
    "position", "slot", "TensorScatter", constant("one", 1), helper.make_node("Add", ["position", "one"], ["slot"])
)
SAME_TOKEN = on_output("next_token", helper.make_node("Identity", ["input_ids"], ["next_token"]))
STUCK = on_output("next_position", helper.make_node("Identity", ["position"], ["next_position"]))


def test_a_sound_target_passes_and_its_curves_cover_every_step(case: ParityCase, setup: ParitySetup) -> None:
    result = check_chain(case, setup)
    assert result.passed, result.failures
    assert result.notes == ()
    assert result.data["windows"] == [0, 2, 5]
    assert result.data["first_divergence"] is None
    for tensor, figures in result.data["tensors"].items():
        assert len(figures["by_step"]) == result.data["steps"] == STEPS, tensor
        assert max(figures["by_step"]) == figures["largest"] == check_of(result, tensor).value
        assert figures["by_step"][figures["step"]] == figures["largest"] < 2e-6
    assert result.data["tensors"]["logits"]["largest"] > 0
    handover = result.data["handover"]
    assert (handover["start"], handover["steps"], handover["first_divergence"]) == (8, 9, None)


@pytest.mark.parametrize(
    ("edit", "check", "sentence"),
    [
        (NAN_AT_FIVE, "first divergence", "step graph at step 5 of window 0: logits is NaN or infinite"),
        (NO_STATE, "first divergence", "step graph at step 1 of window 0: present_key_values.0.key is off"),
        (STALE_STATE, "first divergence", "step graph at step 0 of window 0: present_key_values.0.key is off by"),
        (STALE_STATE, "reset", "step graph at step 0 of window 2, after a reset: present_key_values.0.key is off by"),
        (NEXT_SLOT, "first divergence", "step graph at step 0 of window 0: present_key_values.0.key is off by"),
        (
            NEXT_SLOT,
            "caches",
            "present_key_values.0.key of window 0: slot 16 is not zero, though only 16 tokens were fed",
        ),
        (SAME_TOKEN, "first divergence", "step graph at step 0 of window 0: next_token is 32, expected the argmax"),
        (STUCK, "first divergence", "step graph at step 0 of window 0: next_position is 0, expected 1"),
    ],
)
def test_a_fault_is_named_where_it_shows_first(
    case: ParityCase, setup: ParitySetup, edit: Edit, check: str, sentence: str
) -> None:
    edit_graph(case, "step", edit)
    found = check_of(check_chain(case, setup), check)
    assert found.passed is False
    assert any(sentence in failure for failure in found.failures), found.failures


def test_nan_at_one_step_leaves_the_others_alone(case: ParityCase, setup: ParitySetup) -> None:
    edit_graph(case, "step", NAN_AT_FIVE)
    result = check_chain(case, setup)
    assert result.to_dict()["data"]["first_divergence"] == {
        "step": 5, "window": 0, "tensor": "logits", "error": None, "limit": setup.limits("fp32").chain_error,
    }  # fmt: skip
    curve = result.to_dict()["data"]["tensors"]["logits"]["by_step"]
    assert [step for step, error in enumerate(curve) if error is None] == [5]
    assert check_of(result, "next_state").passed is True


def test_a_chain_that_ends_early_fails_with_the_steps_it_took(case: ParityCase, setup: ParitySetup) -> None:
    def shorten(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name.startswith("rope_"):
                tensor.dims[0] = 11
                size = next(entry for entry in tensor.external_data if entry.key == "length")
                size.value = str(int(size.value) // 64 * 11)

    edit_graph(case, "step", shorten)
    result = check_chain(case, setup)
    steps = check_of(result, "steps")
    assert (steps.value, steps.limit, steps.passed) == (0, STEPS, False)  # no window after the first was reached
    assert "ONNX Runtime failed in step.fp32.onnx" in steps.failures[1]
    assert check_of(result, "first divergence").passed is False
    assert check_of(result, "reset").passed is False
    assert check_of(result, "hand-over").passed is False


def test_what_prefill_hands_over_is_compared(case: ParityCase, setup: ParitySetup) -> None:
    shutil.copyfile(case.graphs["prefill_pass"], case.graphs["prefill"])
    result = check_chain(case, setup)
    handover = check_of(result, "hand-over")
    assert check_of(result, "first divergence").passed is True
    assert handover.passed is False
    assert "prefill graph at step 7 of window" in handover.failures[0]


def test_state_that_outlives_a_reset_is_named(
    case: ParityCase, setup: ParitySetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset = TargetChain.reset

    def forgetful(chain: TargetChain) -> None:
        state = chain._bound._inputs["state"].read().copy()
        reset(chain)
        chain._bound.set(state=state)

    monkeypatch.setattr(TargetChain, "reset", forgetful)
    result = check_chain(case, setup)
    found = check_of(result, "reset")
    assert found.passed is False
    assert "at step 0 of window" in found.failures[0]
    assert "next_state of step 0 differs between two runs of the same text" in found.failures[1]


def test_one_window_runs_twice_so_that_a_reset_is_tested(case: ParityCase, setup: ParitySetup) -> None:
    options = dataclasses.replace(OPTIONS, chain_windows=1, chain_steps=4)
    result = check_chain(case, dataclasses.replace(setup, options=options))
    assert result.passed, result.failures
    assert result.data["windows"] == [0]
    assert check_of(result, "reset").value == result.data["tensors"]["logits"]["largest"] > 0


def test_what_is_shortened_is_noted(case: ParityCase, setup: ParitySetup) -> None:
    options = dataclasses.replace(OPTIONS, chain_windows=9, chain_steps=99)
    notes = check_chain(case, dataclasses.replace(setup, options=options)).notes
    assert notes == (
        "chain: 6 windows instead of 9, all that the text has",
        f"chain: {LENGTH} steps instead of 99, the length of a window",
    )


def test_the_earliest_step_comes_before_the_largest_error() -> None:
    texts = [ChainText(window=3), ChainText(window=7, after_reset=True)]
    errors = ChainErrors(["key", "logits"], texts, range(4), 0.1)
    for step in range(4):
        errors.add(0, step, {"key": np.array([0.0, 0.0]), "logits": np.array([0.0, 0.05])}, {})
    assert errors.first_divergence() is None
    errors.add(0, 2, {"key": np.array([0.2, 0.0]), "logits": np.array([0.9, 0.3])}, {})
    errors.add(0, 3, {"key": np.array([5.0, 5.0]), "logits": np.array([np.nan, 5.0])}, {})
    first, after = errors.first_divergence(), errors.first_divergence(after_reset=True)
    assert first is not None
    assert after is not None
    assert (first.step, first.tensor, first.text.window, first.error) == (2, "key", 3, 0.2)
    assert (after.step, after.tensor, after.text.window, after.error) == (2, "logits", 7, 0.3)
    assert errors.largest("logits") == np.inf
