"""L4: a sound target says the same as PyTorch, and what a fault changes first is named by prompt and token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fault_bundle import SpoiledBundle
from fault_edits import constant, nan_at, node, replace_output, times_zero
from faults_of_graphs import ROPE
from short_setup import check_of, short_setup

from crt_export.checkpoint import Checkpoint
from crt_export.errors import ContractError
from crt_export.parity import free_running
from crt_export.parity.free_running import check_free_running
from crt_export.parity.runner import Runner
from crt_export.parity.setup import ParitySetup
from crt_export.parity.windows import ParityOptions
from crt_export.text import TokenText

LENGTH, PROMPTS, NEW = 24, 6, 20
GRAPH = "prefill_pass"  # which a session on a CPU loads for steps and prefill alike
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
    return short_setup(parity_checkpoint, real_text, OPTIONS)


def test_a_sound_target_says_the_same(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    result = check_free_running(spoiled.case(), setup)
    assert result.passed, result.failures
    assert result.notes == ()
    data = result.data
    assert (data["prompts"], data["prompt_tokens"], data["new_tokens"]) == (PROMPTS, LENGTH // 2, NEW)
    assert (data["identical"], data["agreement"], data["divergences"]) == (PROMPTS, [NEW] * PROMPTS, [])
    assert (data["first_divergence_normalised"], data["divergent_share"]) == (1.0, 0.0)


def test_the_tokens_are_those_of_the_model(setup: ParitySetup) -> None:
    prompts = setup.windows.inputs[:2, :5]
    continuation = setup.reference.continuation(prompts, 4)
    whole = np.concatenate([prompts, continuation.tokens[:, :-1]], axis=1)
    import torch

    (hidden, _), _ = setup.model.sequential(torch.from_numpy(whole))
    expected = setup.model.head(hidden[:, 4:]).argmax(dim=-1).numpy()
    assert np.array_equal(continuation.tokens, expected)


def test_a_bias_towards_one_token_is_a_divergence_that_was_no_near_tie(
    spoiled: SpoiledBundle, setup: ParitySetup
) -> None:
    bias = setup.checkpoint.tensors["lm_head.bias"].numpy().copy()
    bias[65] += 4
    spoiled.set_weight_of(GRAPH, "lm_head.bias", bias)
    result = check_free_running(spoiled.case(), setup)
    found = check_of(result, "first divergence")
    assert found.passed is False
    assert "found 65" in found.failures[0]
    entry = result.data["divergences"][0]
    assert (entry["token"], entry["found"], entry["near_tie"]) == (result.data["agreement"][entry["prompt"]], 65, False)
    assert 0.01 < entry["margin"] <= 4
    assert found.value == max(entry["relative_margin"] for entry in result.data["divergences"])
    assert result.data["identical"] + len(result.data["divergences"]) == PROMPTS
    assert 0 < result.data["divergent_share"] <= 1


def test_state_that_is_not_carried_changes_what_is_said(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    spoiled.edit([GRAPH], replace_output("next_state", *times_zero("before", "next_state")))
    assert check_of(check_free_running(spoiled.case(), setup), "first divergence").passed is False


def test_a_token_that_is_not_the_argmax_is_named(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    spoiled.edit([GRAPH], replace_output("next_token", node("Identity", ["input_ids"], "next_token")))
    result = check_free_running(spoiled.case(), setup)
    assert (
        "after position 0 of prompt 0, expected the argmax of its logits" in check_of(result, "next_token").failures[0]
    )
    assert check_of(result, "first divergence").passed is False


def test_a_token_outside_the_vocabulary_is_named_and_never_fed(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    spoiled.edit(
        [GRAPH], replace_output("next_token", constant("many", 1000), node("Add", ["before", "many"], "next_token"))
    )
    result = check_free_running(spoiled.case(), setup)
    assert check_of(result, "next_token").passed is False
    assert check_of(result, "first divergence").passed is False
    assert result.to_dict()["data"]["divergences"][0]["margin"] is None


def test_nan_is_named_at_its_position(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    spoiled.edit([GRAPH], nan_at("logits", 15))
    logits = check_of(check_free_running(spoiled.case(), setup), "logits")
    assert logits.failures == ("NaN or infinite, first in prompt 0 at position 15",)


def test_a_graph_that_ends_early_says_at_which_step(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    for table in ROPE:
        spoiled.set_weight_of(GRAPH, table, spoiled.weight(table)[:20])
    with pytest.raises(ContractError, match=r"step 20 of 31: .*prefill_pass\.fp32\.onnx"):
        check_free_running(spoiled.case(), setup)


def test_continuations_are_shortened_to_what_a_model_holds(spoiled: SpoiledBundle, setup: ParitySetup) -> None:
    options = dataclasses.replace(OPTIONS, new_tokens=500)
    result = check_free_running(spoiled.case(), dataclasses.replace(setup, options=options))
    assert result.passed, result.failures
    assert result.data["new_tokens"] == 64 - 12 + 1
    assert result.notes == ("free-running: 53 new tokens instead of 500: ort-cpu-fp32 holds 64 tokens",)


def test_prompts_in_small_batches_say_the_same(
    spoiled: SpoiledBundle, setup: ParitySetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = check_free_running(spoiled.case(), setup)
    monkeypatch.setattr(Runner, "most_rows", lambda runner, capacity: 1)
    assert check_free_running(spoiled.case(), setup).to_dict() == whole.to_dict()


def test_a_large_model_continues_fewer_prompts_and_says_so(
    spoiled: SpoiledBundle, setup: ParitySetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_LARGE_PARAMETERS", 1000), ("_LARGE_PROMPTS", 2), ("_LARGE_NEW_TOKENS", 3)):
        monkeypatch.setattr(free_running, name, value)
    result = check_free_running(spoiled.case(), setup)
    assert (result.data["prompts"], result.data["new_tokens"], result.passed) == (2, 3, True)
    assert "2 prompts continued by 3 tokens instead of 6 by 20" in result.notes[0]


@pytest.mark.parametrize(
    ("expected", "found", "divergent"),
    [([1, 2, 3], [1, 2, 3], 0), ([1, 2, 3, 4], [1, 9, 3, 4], 1), ([1, 2, 3, 4], [5, 6, 7, 8], 4), ([1, 2], [2, 1], 1)],
)
def test_divergent_tokens_are_those_left_after_matching(expected: list, found: list, divergent: int) -> None:
    assert free_running._divergent_tokens(expected, found) == divergent
