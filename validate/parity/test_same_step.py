"""One token through the step graph and through a pass: they agree with each other, whatever they agree with besides."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_bundle import SpoiledBundle
from faults import FAULTS

from crt_export.parity import ParityOptions, validate_bundle
from crt_export.parity.level import Check

OPTIONS = ParityOptions(validation_tokens=64, window=32, short_reason="one step", threads=1, levels=("one-step",))
NAME = "step against prefill_pass of one token"


def _check(bundle: Path, text: Path) -> Check:
    report = validate_bundle(bundle, text=text, targets=("ort-cpu-fp32",), options=OPTIONS)
    return next(check for result in report.levels for check in result.checks if check.name == NAME)


def _spoiled(source: Path, copy: Path, fault: str) -> Path:
    bundle = SpoiledBundle(source, copy, "ort-cpu-fp32")
    next(item for item in FAULTS if item.name == fault).inject(bundle)
    bundle.sign()
    return copy


def test_sound_graphs_agree_to_rounding(parity_bundle: Path, heldout_text: Path) -> None:
    check = _check(parity_bundle, heldout_text)
    assert (check.passed, check.tolerance, check.limit) == (True, "fp32.consistency", 1e-5)
    assert check.value is not None
    assert check.value < 1e-6


@pytest.mark.parametrize(
    ("fault", "tensor"),
    [
        ("position off by one: rotary look-up of the step graph", "present_key_values.0.key"),
        ("mask off by one: the step graph sees one empty slot", "logits"),
        ("state not carried: next_state is zero", "next_state"),
    ],
)
def test_a_fault_in_one_form_shows_beside_the_other(
    parity_bundle: Path, heldout_text: Path, tmp_path: Path, fault: str, tensor: str
) -> None:
    check = _check(_spoiled(parity_bundle, tmp_path / "bundle", fault), heldout_text)
    assert check.passed is False
    (sentence,) = check.failures
    assert tensor.split(".")[0] in sentence
    assert "(fp32.consistency)" in sentence


def test_a_fault_in_both_forms_is_for_the_comparison_with_pytorch(
    parity_bundle: Path, heldout_text: Path, tmp_path: Path
) -> None:
    copy = _spoiled(parity_bundle, tmp_path / "bundle", "RoPE layout wrong in every graph")
    assert _check(copy, heldout_text).passed is True
    report = validate_bundle(copy, text=heldout_text, options=OPTIONS)
    assert not report.passed
