"""Converted models give transformers' logits; every parameter is disturbed, windows and positions are exercised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from crt_export.checkpoint import load_checkpoint
from crt_export.convert import FAMILIES, convert
from crt_export.convert.plan import Plan
from crt_export.models.registry import model_from_checkpoint

Theirs = Callable[[str], tuple[Path, torch.Tensor]]
Logits = Callable[[Plan, Path], torch.Tensor]


def test_every_variant_equals_transformers(
    variant: str,
    theirs: Theirs,
    plan_of: Callable[[Path], Plan],
    plan_logits: Logits,
    gate: float,
    record_property: Callable[[str, object], None],
) -> None:
    folder, expected = theirs(variant)
    difference = float((plan_logits(plan_of(folder), folder) - expected).abs().max())
    record_property("conversion", f"{variant}: {difference:.1e} of {float(expected.abs().max()):.2f}")
    assert difference <= gate


def test_every_family_has_a_variant(variants: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    assert {name.split(" ", maxsplit=1)[0] for name in variants} == set(FAMILIES)


@pytest.mark.parametrize("variant", ["llama yarn", "gpt2", "gemma3_text", "cohere norms", "falcon 40b"])
def test_a_zero_correction_computes_the_same_bits(
    variant: str, theirs: Theirs, token_ids: torch.Tensor, gate: float, tmp_path: Path
) -> None:
    folder, expected = theirs(variant)
    convert(folder, tmp_path / "plain", plain=True)
    convert(folder, tmp_path / "crt")
    plain, crt = (model_from_checkpoint(load_checkpoint(tmp_path / name)) for name in ("plain", "crt"))
    with torch.no_grad():
        logits = plain.head(plain.unroll(token_ids, 1)[0].hidden)
        for passes in (1, 3):
            assert torch.equal(crt.head(crt.unroll(token_ids, passes)[0].hidden), logits)
        assert float((plain.head(plain.sequential(token_ids)[0].hidden) - expected).abs().max()) <= gate
    assert float((logits - expected).abs().max()) <= gate


def test_the_correction_is_trainable_and_always_the_same(theirs: Theirs, tmp_path: Path) -> None:
    folder, _ = theirs("llama")
    made = [convert(folder, tmp_path / name, correction_size=20, unroll=5) for name in ("a", "b")]
    tensors = load_checkpoint(tmp_path / "a").tensors
    assert tensors["correction.up.weight"].std() > 0.01
    assert tensors["correction.up.weight"].shape == (20, 32)
    assert not any(tensors[f"correction.{name}"].any() for name in ("down.weight", "down.bias", "up.bias"))
    assert bool((tensors["correction.norm.weight"] == 1).all())
    assert made[0].config.carried.passes == 5
    assert load_checkpoint(tmp_path / "a").sha256 == load_checkpoint(tmp_path / "b").sha256
