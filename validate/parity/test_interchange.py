"""The graphs that other runtimes load: step and prefill beside the one graph of a session, bit by bit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from fault_bundle import SpoiledBundle
from fault_edits import nan_at
from faults import FAULTS

from crt_export.parity import ParityOptions, validate_bundle
from crt_export.parity.interchange import exactness
from crt_export.parity.metrics import Check

OPTIONS = ParityOptions(validation_tokens=64, window=32, short_reason="one step", threads=1, levels=("one-step",))
STEPS = "step: 64 tokens are 64 calls of prefill_pass, bit by bit"
PASSES = "prefill: 2 passes are 2 calls of prefill_pass"
EXACT_PASSES = f"{PASSES}, bit by bit"
TIED = (STEPS, PASSES, EXACT_PASSES)


def _checks(bundle: Path, text: Path, target: str = "ort-cpu-fp32") -> dict[str, Check]:
    report = validate_bundle(bundle, text=text, targets=(target,), options=OPTIONS)
    return {check.name: check for result in report.levels for check in result.checks}


def _inject(bundle: SpoiledBundle, fault: str) -> Path:
    next(item for item in FAULTS if item.name == fault).inject(bundle)
    bundle.sign()
    return bundle.path


@pytest.mark.parametrize("target", ["ort-cpu-fp32", "ort-cpu-int8"])
def test_sound_graphs_agree_to_the_bit(three_targets: Path, heldout_text: Path, target: str) -> None:
    checks = _checks(three_targets, heldout_text, target)
    for name in (STEPS, EXACT_PASSES):
        assert (checks[name].metric, checks[name].value, checks[name].limit) == ("bit_differences", 0, 0)
        assert checks[name].passed is True
    assert checks[PASSES].passed is True
    assert checks[PASSES].tolerance.endswith(".tensor_error")


@pytest.mark.parametrize(
    ("fault", "tensor"),
    [
        ("position off by one: rotary look-up of step", "present_key_values.0.key"),
        ("mask off by one: step sees one empty slot", "logits"),
        ("state not carried: next_state of step is zero", "next_state"),
    ],
)
def test_a_fault_in_the_step_graph_is_named(
    spoiled: SpoiledBundle, heldout_text: Path, fault: str, tensor: str
) -> None:
    checks = _checks(_inject(spoiled, fault), heldout_text)
    assert any(tensor.split(".")[0] in failure for failure in checks[STEPS].failures)
    assert [name for name, check in checks.items() if check.passed is False] == [STEPS]


def test_a_late_fault_is_named_by_its_token(spoiled: SpoiledBundle, heldout_text: Path) -> None:
    spoiled.edit(["step"], nan_at("logits", 50))
    spoiled.sign()
    assert _checks(spoiled.path, heldout_text)[STEPS].failures == ("logits is NaN or infinite at token 50",)


def test_one_pass_too_few_in_prefill_is_named(spoiled: SpoiledBundle, heldout_text: Path) -> None:
    shutil.copyfile(spoiled.graphs["prefill_pass"], spoiled.graphs["prefill"])
    spoiled.sign()
    checks = _checks(spoiled.path, heldout_text)
    failed = [name for name, check in checks.items() if check.passed is False]
    assert failed == [EXACT_PASSES, PASSES]
    assert any("next_hidden differs" in failure for failure in checks[EXACT_PASSES].failures)


def test_a_fault_in_every_graph_is_for_the_comparison_with_pytorch(spoiled: SpoiledBundle, heldout_text: Path) -> None:
    checks = _checks(_inject(spoiled, "RoPE layout wrong in every graph"), heldout_text)
    assert all(checks[name].passed for name in TIED)
    assert not all(check.passed is not False for check in checks.values())


def test_a_target_with_a_graph_for_each_agrees_to_rounding(three_targets: Path, heldout_text: Path) -> None:
    checks = _checks(three_targets, heldout_text, "ort-cuda-fp16")
    check = checks["step against prefill_pass of one token"]
    assert (check.passed, check.tolerance) == (True, "fp16.consistency")
    assert not checks.keys() & set(TIED)


def _flipped(values: np.ndarray) -> np.ndarray:
    changed = values.copy()
    changed.view(np.uint32).flat[1] ^= 1
    return changed


ONES = np.ones((1, 4), np.float32)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"x": _flipped(ONES)}, "x differs in 1 of 4 values here, first at [0, 1]: expected 1, found"),
        ({"x": -ONES * 0}, "x differs in 4 of 4 values here"),
        ({"x": ONES * np.nan}, "x is NaN or infinite here"),
        ({"x": ONES * np.inf}, "x is NaN or infinite here"),
        ({"x": ONES[:, :3]}, "x is float32 [1, 3], expected float32 [1, 4] here"),
        ({"x": ONES.astype(np.float64)}, "x is float64 [1, 4], expected float32 [1, 4] here"),
        ({}, "x is missing here"),
    ],
)
def test_what_is_not_the_same_bits_fails(found: Mapping[str, np.ndarray], sentence: str) -> None:
    assert exactness("it", [("here", {"x": ONES}, {"x": ONES})], 1).passed is True
    check = exactness("it", [("here", found, {"x": ONES})], 1)
    assert check.passed is False
    assert check.failures[0].startswith(sentence)


def test_nothing_compared_fails() -> None:
    empty = np.ones((0, 4), np.float32)
    assert exactness("it", [("here", {"x": empty}, {"x": empty})], 1).passed is False
    assert exactness("it", [("here", {"x": ONES * np.nan}, {"x": ONES * np.nan})], 1).passed is False
    assert exactness("it", [], 0).failures == ("0 of 0 calls were compared",)
    assert exactness("it", [("here", {"x": ONES}, {"x": ONES})], 2).failures == ("1 of 2 calls were compared",)
    assert exactness("it", [("here", {}, {})], 1).passed is False
