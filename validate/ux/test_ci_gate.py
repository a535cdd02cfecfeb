"""examples/06_ci_gate: the script gates, its exit codes are the documented ones, and its reports are kept."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

Gate = Callable[..., "subprocess.CompletedProcess[str]"]
TARGET = "ort-cpu-int8"


@pytest.fixture(scope="module")
def example(root: Path) -> Path:
    return root / "examples" / "06_ci_gate"


@pytest.fixture(scope="module")
def gate(example: Path, root: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """``gate(OUTPUT=..., ...)``: run the script in the checkout, or with ``cwd`` elsewhere."""

    def run(*, cwd: Path = root, timeout: int = 280, **settings: object) -> subprocess.CompletedProcess[str]:
        defaults = {
            "CRT_EXPORT": f"{sys.executable} -m crt_export",
            "OUTPUT": str(tmp_path_factory.mktemp("unused") / "gate"),
        }
        return subprocess.run(
            ["sh", str(example / "gate.sh")],
            cwd=cwd,
            env={**environment, **defaults, **{name: str(value) for name, value in settings.items()}},
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def short(bundle: Path, heldout_text: Path) -> dict[str, object]:
    """Settings that take seconds: a bundle of the main job, the lowest levels."""
    return {"BUNDLE": bundle, "TEXT": heldout_text, "TARGETS": TARGET, "LEVELS": "contract one-step"}


@pytest.fixture(scope="module")
def accepted(gate: Gate, short: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a sound run without a baseline left its reports."""
    output = tmp_path_factory.mktemp("accepted") / "gate"
    result = gate(**short, BASELINE="", OUTPUT=output)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"gate: passed; report: {output}/report.html"
    return output


def _cases(path: Path) -> list[ElementTree.Element]:
    return list(ElementTree.parse(path).getroot().iter("testcase"))


def _failed(path: Path) -> list[str]:
    return [case.get("name", "") for case in _cases(path) if case.find("failure") is not None]


def test_a_sound_bundle_passes_and_leaves_every_report(accepted: Path) -> None:
    report = json.loads((accepted / "report.json").read_text(encoding="utf-8"))
    assert report["passed"] is True
    assert {level["level"] for level in report["levels"]} == {
        "own-model",
        "contract",
        "one-step",
        "corpus",
    }  # the text is judged whichever levels run, and that there was no own model is said
    assert "<html" in (accepted / "report.html").read_text(encoding="utf-8")[:500]
    for name in ("junit-validate.xml", "junit-selftest.xml"):
        assert _cases(accepted / name)
        assert not _failed(accepted / name)
    assert not (accepted / "junit-compare.xml").exists()


def test_a_figure_worse_than_the_baseline_beyond_noise_is_a_regression(
    gate: Gate, short: dict[str, object], accepted: Path, tmp_path: Path
) -> None:
    baseline = json.loads((accepted / "report.json").read_text(encoding="utf-8"))
    (checks,) = [level["checks"] for level in baseline["levels"] if level["level"] == "one-step"]
    # INT8 is off by a share of its limit that is no noise; the older report has a tenth of it.
    check = max((c for c in checks if c["limit"] and c["value"]), key=lambda c: c["value"] / c["limit"])
    check["value"] /= 10
    (tmp_path / "baseline.json").write_text(json.dumps(baseline), encoding="utf-8")
    output = tmp_path / "gate"
    result = gate(**short, BASELINE=tmp_path / "baseline.json", OUTPUT=output)
    assert result.returncode == 1
    assert "regressed" in result.stdout
    assert f"gate: FAILED with exit code 1; what was written is in {output}" in result.stderr
    assert any(check["name"] in name for name in _failed(output / "junit-compare.xml"))
    assert not _failed(output / "junit-validate.xml"), "the gates themselves hold"
    assert (output / "report.html").is_file()


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"TEXT": "none.txt"}, 2, "TEXT: none.txt: expected a file"),
        ({"CHECKPOINT": "none"}, 2, "CHECKPOINT: none: expected a folder"),
        ({"BUNDLE": "none"}, 2, "BUNDLE: none: expected a folder"),
        ({"BASELINE": "none.json"}, 2, "BASELINE: none.json: expected a report"),
        ({"CRT_EXPORT": "no-such-command"}, 3, "CRT_EXPORT: no-such-command: no such command"),
    ],
)
def test_what_is_not_there_is_found_before_minutes_of_work(
    gate: Gate, settings: dict[str, object], code: int, says: str
) -> None:
    result = gate(**{"BASELINE": "", **settings})
    assert result.returncode == code
    assert says in result.stderr
    assert result.stdout == ""


def test_a_bundle_that_was_changed_is_bad_input(gate: Gate, bundle: Path, heldout_text: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    with (copy / "graphs" / "step.w8.onnx").open("ab") as stream:
        stream.write(b"\0")
    result = gate(BUNDLE=copy, TEXT=heldout_text, TARGETS=TARGET, BASELINE="")
    assert result.returncode == 2
    assert "step.w8.onnx" in result.stderr


@pytest.mark.evidence
def test_a_faulty_bundle_fails_and_its_report_says_where(
    gate: Gate, short: dict[str, object], accepted: Path, root: Path, tmp_path: Path
) -> None:
    sys.path.append(str(root / "validate" / "parity"))
    faults = importlib.import_module("faults").FAULTS
    bundle = importlib.import_module("fault_bundle").SpoiledBundle(short["BUNDLE"], tmp_path / "bundle", TARGET)
    next(
        fault for fault in faults if fault.name == "state not carried: next_state of the session's graph is zero"
    ).inject(bundle)
    bundle.sign()
    output = tmp_path / "gate"
    settings = {**short, "BUNDLE": bundle.path}
    result = gate(**settings, BASELINE=accepted / "report.json", OUTPUT=output)
    assert result.returncode == 1
    assert json.loads((output / "report.json").read_text(encoding="utf-8"))["passed"] is False
    assert any("next_state" in name for name in _failed(output / "junit-validate.xml"))
    assert _failed(output / "junit-selftest.xml")  # it replays what a session runs
    assert _failed(output / "junit-compare.xml")
    assert "next_state" in (output / "report.html").read_text(encoding="utf-8")


@pytest.mark.evidence
@pytest.mark.timeout(1500)
def test_the_demo_is_sound_against_the_committed_baseline(gate: Gate, tmp_path: Path) -> None:
    """All defaults, as the README's first command: build, self-test, every level with the certificate, compare."""
    output = tmp_path / "gate"
    result = gate(OUTPUT=output, timeout=1400)
    assert result.returncode == 0, result.stdout + result.stderr
    report: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert "certificate" in {level["level"] for level in report["levels"]}
    assert _cases(output / "junit-compare.xml")
    assert not _failed(output / "junit-compare.xml")


@pytest.mark.evidence
def test_a_build_that_does_not_agree_leaves_its_report(
    gate: Gate, make_checkpoint: Callable[..., Path], tmp_path: Path, heldout_text: Path
) -> None:
    """One weight of 1e4 in an untrained model: eight bits cannot hold its row."""

    def outlier(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"][:, 0] = 1e4

    checkpoint = make_checkpoint(edit=outlier, num_hidden_layers=1, hidden_size=16, intermediate_size=32)
    output = tmp_path / "gate"
    result = gate(CHECKPOINT=checkpoint, TEXT=heldout_text, TARGETS=TARGET, BASELINE="", OUTPUT=output)
    assert result.returncode == 1, result.stderr
    assert not (output / "bundle").exists()
    assert json.loads((output / "report.json").read_text(encoding="utf-8"))["passed"] is False
    assert _failed(output / "junit-validate.xml")
    assert (output / "report.html").is_file()


def test_the_documented_settings_and_exit_codes_are_those_of_the_script(example: Path) -> None:
    readme = (example / "README.md").read_text(encoding="utf-8")
    script = (example / "gate.sh").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", readme, re.M)) == set(re.findall(r"^([A-Z_]+)=\$\{\1", script, re.M))
    documented = [int(code) for code in re.findall(r"^\| (\d+) \|", readme, re.M)]
    assert documented == [0, 1, 2, 3, 70, 130]
    line = next(line for line in script.splitlines() if line.startswith("# Exit codes"))
    assert [int(code) for code in re.findall(r"\b\d+\b", line)] == documented


def test_the_workflow_pins_its_actions_and_keeps_the_reports_of_a_failure(example: Path, root: Path) -> None:
    workflow = yaml.safe_load((example / "github-workflow.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["gate"]["steps"]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", name) for name in used)
    assert workflow["permissions"] == {"contents": "read"}
    upload = steps[-1]
    assert upload["if"] == "always()"
    (run,) = [step for step in steps if "env" in step]
    output = run["env"]["OUTPUT"]
    assert f"{output}/report.html" in upload["with"]["path"].split()
    for name in ("CHECKPOINT", "TEXT"):
        assert (root / run["env"][name]).exists()
    assert (root / workflow["env"]["GATE"]).is_file()
