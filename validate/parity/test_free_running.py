"""L4: a sound target says the same as PyTorch, and what a fault changes first is named by prompt and token."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from crt_export.checkpoint import Checkpoint
from crt_export.errors import ContractError
from crt_export.model import model_from_checkpoint
from crt_export.parity import free_running
from crt_export.parity.case import ParityCase
from crt_export.parity.free_running import check_free_running
from crt_export.parity.level import Check, LevelResult, ParitySetup
from crt_export.parity.reference import Reference
from crt_export.parity.tolerances import load_tolerances
from crt_export.parity.windows import ParityOptions, windows_from_text
from crt_export.progress import no_progress
from crt_export.text import TokenText

LENGTH, PROMPTS, NEW = 24, 6, 20
OPTIONS = ParityOptions(
    validation_tokens=6 * LENGTH,
    window=LENGTH,
    short_reason="fault injection",
    threads=1,
    prompts=PROMPTS,
    new_tokens=NEW,
)


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
def step(parity_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the step graph beside its weights."""
    return Path(shutil.copytree(parity_bundle / "graphs", tmp_path / "graphs")) / "step.fp32.onnx"


@pytest.fixture
def case(step: Path, parity_checkpoint: Checkpoint) -> ParityCase:
    return ParityCase(
        target="ort-cpu-fp32",
        runtime="onnxruntime",
        precision="fp32",
        graphs={"step": step},
        unroll=2,
        cache_dtype="float32",
    )


def check_of(result: LevelResult, name: str) -> Check:
    return next(check for check in result.checks if check.name == name)


def reroute(path: Path, name: str, *parts: onnx.NodeProto | onnx.TensorProto) -> None:
    """Put nodes between what computes an output and the output; they and all others read ``before``."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["before" if value == name else value for value in node.output]
        node.input[:] = ["before" if value == name else value for value in node.input]
    model.graph.node.extend(part for part in parts if isinstance(part, onnx.NodeProto))
    model.graph.initializer.extend(part for part in parts if isinstance(part, onnx.TensorProto))
    onnx.save(model, path)


def constant(name: str, value: object, dtype: type = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def test_a_sound_target_says_the_same(case: ParityCase, setup: ParitySetup) -> None:
    result = check_free_running(case, setup)
    assert result.passed, result.failures
    assert result.notes == ()
    data = result.data
    assert (data["prompts"], data["prompt_tokens"], data["new_tokens"]) == (PROMPTS, LENGTH // 2, NEW)
    assert (data["identical"], data["agreement"], data["divergences"]) == (PROMPTS, [NEW] * PROMPTS, [])
    assert (data["first_divergence_normalised"], data["divergent_share"]) == (1.0, 0.0)


def test_the_tokens_are_those_of_the_model(setup: ParitySetup) -> None:
    prompts = setup.windows.inputs[:2, :5]
    continuation = free_running.continue_greedily(setup.reference, prompts, 4)
    whole = np.concatenate([prompts, continuation.tokens[:, :-1]], axis=1)
    import torch

    hidden, _ = setup.model.sequential(torch.from_numpy(whole))
    expected = setup.model.head(hidden[:, 4:]).argmax(dim=-1).numpy()
    assert np.array_equal(continuation.tokens, expected)


def test_a_bias_towards_one_token_is_a_divergence_that_was_no_near_tie(
    case: ParityCase, step: Path, setup: ParitySetup
) -> None:
    bias = setup.checkpoint.tensors["lm_head.bias"].numpy().copy()
    bias[65] += 4
    model = onnx.load(step, load_external_data=False)
    next(t for t in model.graph.initializer if t.name == "lm_head.bias").CopyFrom(
        numpy_helper.from_array(bias, "lm_head.bias")
    )
    onnx.save(model, step)
    result = check_free_running(case, setup)
    found = check_of(result, "first divergence")
    assert found.passed is False
    assert "found 65" in found.failures[0]
    entry = result.data["divergences"][0]
    assert (entry["token"], entry["found"], entry["near_tie"]) == (result.data["agreement"][entry["prompt"]], 65, False)
    assert 0.01 < entry["margin"] <= 4
    assert found.value == max(entry["relative_margin"] for entry in result.data["divergences"])
    assert result.data["identical"] + len(result.data["divergences"]) == PROMPTS
    assert 0 < result.data["divergent_share"] <= 1


def test_state_that_is_not_carried_changes_what_is_said(case: ParityCase, step: Path, setup: ParitySetup) -> None:
    zero = constant("zero", 0, np.float32)
    reroute(step, "next_state", zero, helper.make_node("Mul", ["before", "zero"], ["next_state"]))
    assert check_of(check_free_running(case, setup), "first divergence").passed is False


def test_a_token_that_is_not_the_argmax_is_named(case: ParityCase, step: Path, setup: ParitySetup) -> None:
    reroute(step, "next_token", helper.make_node("Identity", ["input_ids"], ["next_token"]))
    result = check_free_running(case, setup)
    assert (
        "after position 0 of prompt 0, expected the argmax of its logits" in check_of(result, "next_token").failures[0]
    )
    assert check_of(result, "first divergence").passed is False


def test_a_token_outside_the_vocabulary_is_named_and_never_fed(
    case: ParityCase, step: Path, setup: ParitySetup
) -> None:
    reroute(step, "next_token", constant("many", 1000), helper.make_node("Add", ["before", "many"], ["next_token"]))
    result = check_free_running(case, setup)
    assert check_of(result, "next_token").passed is False
    assert check_of(result, "first divergence").passed is False
    assert result.to_dict()["data"]["divergences"][0]["margin"] is None


def test_nan_is_named_at_its_position(case: ParityCase, step: Path, setup: ParitySetup) -> None:
    reroute(
        step,
        "logits",
        constant("wanted", 15),
        constant("axes", [1]),
        constant("nan", np.nan, np.float32),
        helper.make_node("Equal", ["position", "wanted"], ["here"]),
        helper.make_node("Unsqueeze", ["here", "axes"], ["rows"]),
        helper.make_node("Where", ["rows", "nan", "before"], ["logits"]),
    )
    logits = check_of(check_free_running(case, setup), "logits")
    assert logits.failures == ("NaN or infinite, first in prompt 0 at position 15",)


def test_a_graph_that_ends_early_says_at_which_step(case: ParityCase, step: Path, setup: ParitySetup) -> None:
    model = onnx.load(step, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("rope_"):
            size = next(entry for entry in tensor.external_data if entry.key == "length")
            size.value = str(int(size.value) // tensor.dims[0] * 20)
            tensor.dims[0] = 20
    onnx.save(model, step)
    with pytest.raises(ContractError, match=r"step 20 of 31: .*step\.fp32\.onnx"):
        check_free_running(case, setup)


def test_continuations_are_shortened_to_what_a_model_holds(case: ParityCase, setup: ParitySetup) -> None:
    options = dataclasses.replace(OPTIONS, new_tokens=500)
    result = check_free_running(case, dataclasses.replace(setup, options=options))
    assert result.passed, result.failures
    assert result.data["new_tokens"] == 64 - 12 + 1
    assert result.notes == ("free-running: 53 new tokens instead of 500: ort-cpu-fp32 holds 64 tokens",)


def test_prompts_in_small_batches_say_the_same(
    case: ParityCase, setup: ParitySetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = check_free_running(case, setup)
    monkeypatch.setattr(free_running, "_BATCH_BYTES", 1)
    assert check_free_running(case, setup).to_dict() == whole.to_dict()


def test_a_large_model_continues_fewer_prompts_and_says_so(
    case: ParityCase, setup: ParitySetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_LARGE_PARAMETERS", 1000), ("_LARGE_PROMPTS", 2), ("_LARGE_NEW_TOKENS", 3)):
        monkeypatch.setattr(free_running, name, value)
    result = check_free_running(case, setup)
    assert (result.data["prompts"], result.data["new_tokens"], result.passed) == (2, 3, True)
    assert "2 prompts continued by 3 tokens instead of 6 by 20" in result.notes[0]


@pytest.mark.parametrize(
    ("expected", "found", "divergent"),
    [([1, 2, 3], [1, 2, 3], 0), ([1, 2, 3, 4], [1, 9, 3, 4], 1), ([1, 2, 3, 4], [5, 6, 7, 8], 4), ([1, 2], [2, 1], 1)],
)
def test_divergent_tokens_are_those_left_after_matching(expected: list, found: list, divergent: int) -> None:
    assert free_running._divergent_tokens(expected, found) == divergent
