"""crt-export selftest as a user runs it where a bundle is deployed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def golden(root: Path, tmp_path: Path) -> Path:
    """A copy of the golden bundle, which a test may damage."""
    return Path(shutil.copytree(root / "validate" / "golden" / "bundle-v1", tmp_path / "bundle"))


def test_a_sound_bundle_passes_and_says_what_was_compared(crt_export: Run, golden: Path) -> None:
    result = crt_export("selftest", golden)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:9]] == [
        [target, replay]
        for target in ("ort-cpu-fp32", "ort-cpu-int8")
        for replay in ("step", "prefill", "prefill_pass", "reset")
    ]
    assert lines[-1].startswith("self-test: passed (2 targets, ")


def test_json_is_one_document_and_junit_a_file(crt_export: Run, golden: Path, tmp_path: Path) -> None:
    junit = tmp_path / "selftest.xml"
    result = crt_export("selftest", golden, "--json", "--junit", junit)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["passed"] is True
    assert [target["status"] for target in document["targets"]] == ["passed", "passed"]
    assert document["targets"][0]["replays"][0]["tensors"]["logits"]["limit"] == 2e-5
    assert document["vectors"]["ids"] == "validation text"
    root = ElementTree.parse(junit).getroot()
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("8", "0", "0")


def test_a_changed_weight_is_exit_1_in_every_form(
    crt_export: Run, golden: Path, tmp_path: Path, change_step_weight: Callable[..., None]
) -> None:
    change_step_weight(golden, "layers.0.mlp.down.weight", 1.01)
    junit = tmp_path / "selftest.xml"
    result = crt_export("selftest", golden, "--target", "ort-cpu-fp32", "--junit", junit)
    assert result.returncode == 1, result.stderr
    assert "off: ort-cpu-fp32, prefill: logits after the prompt of " in result.stdout
    assert "self-test: FAILED (1 targets" in result.stdout
    failures = ElementTree.parse(junit).getroot().findall(".//testcase[@name='prefill']/failure")
    assert "logits after the prompt of" in (failures[0].text or "")
    result = crt_export("selftest", golden, "--json")
    assert result.returncode == 1
    document = json.loads(result.stdout)
    assert [target["status"] for target in document["targets"]] == ["failed", "passed"]


def test_unusable_bundles_and_arguments_are_exit_2(crt_export: Run, golden: Path, sign_again: Any) -> None:
    assert crt_export("selftest", golden, "--target", "none").returncode == 2
    assert crt_export("selftest", golden, "--junit", golden / "no" / "file.xml").returncode == 2
    shutil.rmtree(golden / "selftest")
    sign_again(golden)
    result = crt_export("selftest", golden)
    assert result.returncode == 2
    assert "build it again with 'crt-export build'" in result.stderr


def test_a_build_writes_vectors_and_targets_of_other_machines_are_named(crt_export: Run, bundle: Path) -> None:
    """The main job's bundle also holds what was compiled for a GPU, which CI has not."""
    result = crt_export("selftest", bundle, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(result.stdout)
    statuses = {target["target"]: target["status"] for target in document["targets"]}
    assert statuses["ort-cpu-fp32"] == statuses["ort-cpu-int8"] == "passed"
    assert document["vectors"]["ids"] == "validation text"
    other = next((name for name, status in statuses.items() if status == "not run"), None)
    if other is None:
        pytest.skip("every target of the bundle runs here")
    asked = crt_export("selftest", bundle, "--target", other)
    assert asked.returncode == 3
    assert f"not run here: {other}: " in asked.stdout
    assert "NOT PASSED" in asked.stdout
