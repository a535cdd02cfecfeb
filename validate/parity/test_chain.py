"""L2: a sound target passes, and a fault in the graph of its steps is named by tensor, step and window."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from fault_bundle import SpoiledBundle
from fault_edits import Edit, constant, nan_at, node, replace_output, replace_value, times_zero
from short_setup import check_of, short_setup

from crt_export.checkpoint import Checkpoint
from crt_export.parity.chain import check_chain
from crt_export.parity.chain_errors import ChainErrors
from crt_export.parity.decoding import Decoding
from crt_export.parity.setup import ParitySetup
from crt_export.parity.windows import ParityOptions
from crt_export.text import TokenText

LENGTH, STEPS, WINDOWS = 24, 16, 3
GRAPH = "prefill_pass"  # which a session on a CPU loads for steps and prefill alike
OPTIONS = ParityOptions(
    validation_tokens=6 * LENGTH,
    window=LENGTH,
    short_reason="fault injection",
    threads=1,
    chain_windows=WINDOWS,
    chain_steps=STEPS,
)


@pytest.fixture
def setup(parity_checkpoint: Checkpoint, real_text: TokenText) -> ParitySetup:
    return short_setup(parity_checkpoint, real_text, OPTIONS)


def where_position_is(position: int, value: object, kept: str, result: str) -> list[onnx.NodeProto | onnx.TensorProto]:
    """``result`` is ``value`` in the rows at one position and ``kept`` elsewhere."""
    axes = [1] if result == "logits" else [1, 2]
    return [
        constant("wanted", position),
        constant("axes", axes),
        constant("value", value, np.float32),
        node("Equal", ["position", "wanted"], "here"),
        node("Unsqueeze", ["here", "axes"], "rows"),
        node("Where", ["rows", "value", kept], result),
    ]


NAN_AT_FIVE = nan_at("logits", 5)
NO_STATE = replace_value("state", *times_zero("state", "no_state"), result="no_state")
STALE_STATE = replace_value(
    "state", *where_position_is(0, np.linspace(-1, 1, 16), "state", "state.kept"), result="state.kept"
)
NEXT_SLOT = replace_value(
    "position",
    constant("one", 1),
    node("Add", ["position", "one"], "slot"),
    result="slot",
    consumers=lambda item: item.op_type == "TensorScatter",
)
SAME_TOKEN = replace_output("next_token", node("Identity", ["input_ids"], "next_token"))
STUCK = replace_output("next_position", node("Identity", ["position"], "next_position"))


def test_a_sound_target_passes_and_its_curves_cover_every_step(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    result = check_chain(spoiled.case(), setup)
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
        (NAN_AT_FIVE, "first divergence", f"{GRAPH} graph at step 5 of window 0: logits is NaN or infinite"),
        (NO_STATE, "first divergence", f"{GRAPH} graph at step 1 of window 0: present_key_values.0.key is off"),
        (
            STALE_STATE,
            "first divergence",
            f"{GRAPH} graph at step 0 of window 0: present_key_values.0.key is off by",
        ),
        (
            STALE_STATE,
            "reset",
            f"{GRAPH} graph at step 0 of window 2, after a reset: present_key_values.0.key is off by",
        ),
        (NEXT_SLOT, "first divergence", f"{GRAPH} graph at step 0 of window 0: present_key_values.0.key is off by"),
        (
            NEXT_SLOT,
            "caches",
            "present_key_values.0.key of window 0: slot 16 is not zero, though only 16 tokens were fed",
        ),
        (
            SAME_TOKEN,
            "first divergence",
            f"{GRAPH} graph at step 0 of window 0: next_token is 32, expected the argmax",
        ),
        (STUCK, "first divergence", f"{GRAPH} graph at step 0 of window 0: next_position is 0, expected 1"),
    ],
)
def test_a_fault_is_named_where_it_shows_first(
    spoiled: SpoiledBundle, setup: ParitySetup, edit: Edit, check: str, sentence: str
) -> None:
    spoiled.edit([GRAPH], edit)
    found = check_of(check_chain(spoiled.case(), setup), check)
    assert found.passed is False
    assert any(sentence in failure for failure in found.failures), found.failures


def test_nan_at_one_step_leaves_the_others_alone(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    spoiled.edit([GRAPH], NAN_AT_FIVE)
    result = check_chain(spoiled.case(), setup)
    assert result.to_dict()["data"]["first_divergence"] == {
        "step": 5, "window": 0, "tensor": "logits", "error": None, "limit": setup.limits("fp32").chain_error,
    }  # fmt: skip
    curve = result.to_dict()["data"]["tensors"]["logits"]["by_step"]
    assert [step for step, error in enumerate(curve) if error is None] == [5]
    assert check_of(result, "next_state").passed is True


def test_a_chain_that_ends_early_fails_with_the_steps_it_took(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    def shorten(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name.startswith("rope_"):
                tensor.dims[0] = 11
                size = next(entry for entry in tensor.external_data if entry.key == "length")
                size.value = str(int(size.value) // 64 * 11)

    spoiled.edit([GRAPH], shorten)
    result = check_chain(spoiled.case(), setup)
    steps = check_of(result, "steps")
    assert (steps.value, steps.limit, steps.passed) == (0, STEPS, False)  # no window after the first was reached
    assert "ONNX Runtime failed in prefill_pass.fp32.onnx" in steps.failures[1]
    assert check_of(result, "first divergence").passed is False
    assert check_of(result, "reset").passed is False
    assert check_of(result, "handover").passed is False


def test_what_prefill_hands_over_is_compared(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    """The state after several tokens is divided by their number, so that no step is wrong."""
    spoiled.edit(
        [GRAPH],
        replace_output(
            "next_state",
            constant("axes", [1, 2]),
            node("Cast", ["length"], "tokens", to=onnx.TensorProto.FLOAT),
            node("Unsqueeze", ["tokens", "axes"], "rows"),
            node("Div", ["before", "rows"], "next_state"),
        ),
    )
    result = check_chain(spoiled.case(), setup)
    handover = check_of(result, "handover")
    assert check_of(result, "first divergence").passed is True
    assert handover.passed is False
    assert f"{GRAPH} graph at step 7 of window 0: next_state" in handover.failures[0]


def test_state_that_outlives_a_reset_is_named(
    spoiled: SpoiledBundle, setup: ParitySetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoding, "reset", Decoding.empty_caches)
    result = check_chain(spoiled.case(), setup)
    found = check_of(result, "reset")
    assert found.passed is False
    assert "at step 0 of window" in found.failures[0]
    assert "next_state of step 0 differs between two runs of the same text" in found.failures[1]


def test_one_window_runs_twice_so_that_a_reset_is_tested(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    options = dataclasses.replace(OPTIONS, chain_windows=1, chain_steps=4)
    result = check_chain(spoiled.case(), dataclasses.replace(setup, options=options))
    assert result.passed, result.failures
    assert result.data["windows"] == [0]
    assert check_of(result, "reset").value == result.data["tensors"]["logits"]["largest"] > 0


def test_what_is_shortened_is_noted(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    options = dataclasses.replace(OPTIONS, chain_windows=9, chain_steps=99)
    notes = check_chain(spoiled.case(), dataclasses.replace(setup, options=options)).notes
    assert notes == (
        "chain: 6 windows instead of 9, all that the text has",
        f"chain: {LENGTH} steps instead of 99, the length of a window",
    )


def test_the_earliest_step_comes_before_the_largest_error() -> None:
    errors = ChainErrors(["key", "logits"], [3, 7], range(4), 0.1, fresh=1)
    for step in range(4):
        errors.add(0, step, {"key": np.array([0.0, 0.0]), "logits": np.array([0.0, 0.05])}, {})
    assert errors.first_divergence() is None
    errors.add(0, 2, {"key": np.array([0.2, 0.0]), "logits": np.array([0.9, 0.3])}, {})
    errors.add(0, 3, {"key": np.array([5.0, 5.0]), "logits": np.array([np.nan, 5.0])}, {})
    first, after = errors.first_divergence(), errors.first_divergence(after_reset=True)
    assert first is not None
    assert after is not None
    assert (first.step, first.tensor, first.window, first.error) == (2, "key", 3, 0.2)
    assert (after.step, after.tensor, after.window, after.error) == (2, "logits", 7, 0.3)
    assert errors.largest("logits") == np.inf
