"""A bundle is checked where it lies: verified files, its own reference, and never the text it was calibrated on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crt_export.bundle.manifest import sealed
from crt_export.checkpoint import Checkpoint
from crt_export.errors import BundleError, InputError
from crt_export.parity import ParityOptions, ParityReport, validate_bundle
from crt_export.parity.check import held_out_text
from crt_export.profile import load_profile
from crt_export.quantize.plan import PLAN_FILE
from crt_export.report.reading import read_report
from crt_export.text import TokenText, split_text

SHORT = ParityOptions(validation_tokens=128, window=16, short_reason="test of the way there", threads=1)


@pytest.fixture
def copy(parity_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parity_bundle, tmp_path / "bundle"))


def _without_reference(bundle: Path) -> None:
    shutil.rmtree(bundle / "reference")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("reference/")}
    (bundle / "manifest.json").write_text(json.dumps(sealed(manifest)))


def test_validating_again_gives_the_figures_of_the_build(parity_bundle: Path, heldout_text: Path) -> None:
    stored = read_report(parity_bundle)
    again = validate_bundle(parity_bundle, text=heldout_text)
    assert again.passed
    assert again.text == {**stored.text, "source": again.text["source"]}
    assert [row.nll for row in again.rows] == pytest.approx([row.nll for row in stored.rows], abs=1e-6)
    assert again.text["windows"] * again.text["window"] >= 4096


def test_token_file_and_target_can_be_chosen(parity_bundle: Path, tmp_path: Path, real_text: TokenText) -> None:
    np.save(tmp_path / "tokens.npy", real_text.ids[20_000:20_200])
    report = validate_bundle(parity_bundle, tokens=tmp_path / "tokens.npy", targets=("ort-cpu-fp32",), options=SHORT)
    assert report.passed
    assert report.notes[0].endswith("test of the way there")


def test_a_copy_of_hard_links_is_validated(copy: Path, tmp_path: Path, heldout_text: Path) -> None:
    """``cp -al`` and stores that keep equal files once make them; onnx_ir refuses such weight files."""
    linked = Path(shutil.copytree(copy, tmp_path / "linked", copy_function=os.link))
    assert validate_bundle(linked, text=heldout_text, options=replace(SHORT, levels=("contract", "one-step"))).passed


def test_unknown_targets_are_refused_by_name(parity_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"unknown target 'rtx': .* was built for ort-cpu-fp32"):
        validate_bundle(parity_bundle, targets=("rtx",), options=SHORT)


def test_text_that_is_too_short_says_what_is_needed(parity_bundle: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("far too short")
    with pytest.raises(InputError, match="need 4097"):
        validate_bundle(parity_bundle, text=short)


def test_a_changed_graph_is_refused_before_it_is_run(copy: Path) -> None:
    step = copy / "graphs" / "step.fp32.onnx"
    step.write_bytes(step.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match=r"step\.fp32\.onnx"):
        validate_bundle(copy, options=SHORT)


def _with_int8_target(bundle: Path, quantization: dict[str, str]) -> None:
    """Give a bundle a target of w8a8, whose graphs are those of the first."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    profile = load_profile("rtx-sm80-int8").with_capacity(64).with_unroll(2)
    target = {**next(iter(manifest["targets"].values())), "profile": profile.to_dict(), "cache_dtype": "float16"}
    manifest["targets"]["rtx-sm80-int8"], manifest["quantization"] = target, quantization
    for name in quantization.values():
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(sealed(manifest)))


def test_a_target_of_w8a8_without_its_plan_is_refused(copy: Path) -> None:
    _with_int8_target(copy, {})
    with pytest.raises(BundleError, match=r"target rtx-sm80-int8 is w8a8, expected the file of its plan .* found none"):
        validate_bundle(copy, options=SHORT)


def test_a_plan_that_is_damaged_or_none_is_refused(copy: Path) -> None:
    (copy / PLAN_FILE).write_bytes(b"no plan")
    _with_int8_target(copy, {"w8a8": PLAN_FILE})
    with pytest.raises(BundleError, match="expected the plan of w8a8, a safetensors file"):
        validate_bundle(copy, options=SHORT)
    (copy / PLAN_FILE).write_bytes(b"no_plan")
    with pytest.raises(BundleError, match=r"w8a8\.plan\.safetensors"):
        validate_bundle(copy, options=SHORT)


def test_a_changed_reference_is_refused(copy: Path) -> None:
    config = copy / "reference" / "config.json"
    config.write_text(config.read_text().replace("10000.0", "20000.0"))
    with pytest.raises(BundleError, match=r"reference/config\.json"):
        validate_bundle(copy, options=SHORT)


def test_without_reference_the_very_checkpoint_is_needed(
    copy: Path, parity_checkpoint: Checkpoint, tiny_checkpoint: Path
) -> None:
    _without_reference(copy)
    with pytest.raises(BundleError, match="--checkpoint DIR"):
        validate_bundle(copy, options=SHORT)
    with pytest.raises(InputError, match="give the very checkpoint"):
        validate_bundle(copy, checkpoint=tiny_checkpoint, options=SHORT)
    assert validate_bundle(copy, checkpoint=parity_checkpoint.path, options=SHORT).passed


def test_an_unvalidated_bundle_can_be_validated(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest |= {"validated": False, "parity": None}
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    assert validate_bundle(copy, options=SHORT).passed


def test_text_that_was_calibrated_on_is_left_out(real_text: TokenText) -> None:
    calibration, validation = split_text(real_text, calibrate=True)
    assert calibration is not None
    record = {"offset": calibration.offset, "tokens": len(calibration), "sha256": calibration.sha256}
    text = {"offset": validation.offset, "tokens": len(validation), "sha256": validation.sha256}
    report = ParityReport(levels=(), tolerances={}, text=text)
    for found_report, calibrated in ((None, record), (report, None), (report, record)):
        found = held_out_text(real_text, found_report, calibrated)
        assert (found.offset, found.sha256) == (validation.offset, validation.sha256)
        other = TokenText(ids=real_text.ids[::-1].copy(), source="another text")
        assert held_out_text(other, found_report, calibrated) is other


def test_progress_names_every_stage(parity_bundle: Path, heldout_text: Path) -> None:
    seen: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        seen.append(stage)

    assert validate_bundle(parity_bundle, text=heldout_text, options=SHORT, progress=progress).passed
    assert {"level 4 of 5: PyTorch FP32: step", "level 4 of 5: ort-cpu-fp32: handover"} <= set(seen)
