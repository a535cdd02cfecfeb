"""The comparison with one's own model from the document to the verdict: snippet, build, validate, inspect, reports."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from own_torch_model import Habits, OwnModel

from crt_export.checkpoint import load_checkpoint
from crt_export.cli import main
from crt_export.errors import InputError
from crt_export.parity import ParityOptions, validate_bundle
from crt_export.parity.levels import NOT_COMPARED, OWN_MODEL
from crt_export.parity.own_model import check_own_model
from crt_export.parity.report import ParityReport
from crt_export.pipeline import BuildOptions
from crt_export.report.compare import compare_reports

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "compare-with-your-model.md"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "unroll_steps": 2}
AGREES = "agrees with your own model (largest difference of logits "


def write_as_documented(folder: Path, checkpoint: Path, heldout_text: Path, habits: Habits) -> Path:
    """Run the document's snippet, word by word, with a project that has this checkpoint's weights."""
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
    assert len(code.splitlines()) <= 20
    project = types.ModuleType("my_project")
    vars(project).update(
        load_model=lambda: OwnModel(load_checkpoint(checkpoint).tensors, habits),
        encode=lambda text: [*text.encode()[:60]],
    )
    folder.mkdir()
    (folder / "heldout.txt").write_bytes(heldout_text.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "my_project", project)
        patch.chdir(folder)
        exec(compile(code, str(DOCUMENT), "exec"), {})
    return folder / "expect.safetensors"


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path], shared_traces: None) -> Path:
    return make_checkpoint(**SMALL)


@pytest.fixture(scope="module")
def expect(checkpoint: Path, heldout_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a model of the same equations gives."""
    return write_as_documented(tmp_path_factory.mktemp("own") / "same", checkpoint, heldout_text, Habits())


@pytest.fixture(scope="module")
def other(checkpoint: Path, heldout_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a model gives that pairs half and half."""
    folder = tmp_path_factory.mktemp("own") / "other"
    return write_as_documented(folder, checkpoint, heldout_text, Habits(layout="half"))


def build(checkpoint: Path, output: Path, text: Path, *more: str) -> int:
    chosen = ["--target", "ort-cpu-fp32", "--text", str(text), "--short-validation", "a test of the way there"]
    return main(["build", str(checkpoint), "--output", str(output), *chosen, "--no-cache", *more])


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, expect: Path, heldout_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "bundle"
    assert build(checkpoint, output, heldout_text, "--expect", str(expect)) == 0
    return output


def content(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_bundle_keeps_how_its_reference_agrees(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    assert f"validated, {AGREES}" in capsys.readouterr().out
    assert main(["inspect", str(bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["own_model"].startswith(AGREES)
    assert document["parity"] == {"passed": True, "report": "report.json"}
    first = json.loads((bundle / "report.json").read_bytes())["levels"][0]
    assert (first["level"], first["passed"]) == (OWN_MODEL, True)


def test_a_plain_transformer_agrees_too(
    make_checkpoint: Callable[..., Path], heldout_text: Path, tmp_path: Path
) -> None:
    plain = make_checkpoint(model_type="transformer", rope_layout="half")
    file = write_as_documented(tmp_path / "own", plain, heldout_text, Habits(layout="half"))
    assert check_own_model(load_checkpoint(plain), file).passed


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_build_that_differs_leaves_the_output_as_it_was(
    bundle: Path, checkpoint: Path, other: Path, heldout_text: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    before = content(bundle)
    assert build(checkpoint, bundle, heldout_text, "--expect", str(other), *(["--json"] * as_json)) == 1
    out, err = capsys.readouterr()
    assert "with rope_layout = 'half' the difference falls from" in err
    assert "set it in config.json" in err
    assert "export" not in err.split("error:")[0]  # before any graph
    assert content(bundle) == before
    assert [entry.name for entry in bundle.parent.iterdir()] == [bundle.name]
    if as_json:
        assert [level["passed"] for level in json.loads(out)["levels"]] == [False]
    else:
        assert "own-model" in out
        assert "FAILED" in out


def test_a_file_that_says_nothing_ends_a_build_with_exit_code_2(
    bundle: Path, checkpoint: Path, heldout_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(bundle)
    assert build(checkpoint, bundle, heldout_text, "--expect", str(heldout_text)) == 2
    assert "expected a safetensors file with input_ids" in capsys.readouterr().err
    assert content(bundle) == before


def test_validate_compares_the_bundles_own_reference(
    bundle: Path, expect: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["validate", str(bundle), "--level", OWN_MODEL, "--junit", str(tmp_path / "junit.xml")]
    assert main([*only, "--expect", str(expect)]) == 0
    assert f"parity: passed, {AGREES}" in capsys.readouterr().out
    report = tmp_path / "report.json"
    assert main([*only, "--expect", str(other), "--report", str(report)]) == 1
    out = capsys.readouterr().out
    assert "parity: FAILED, does NOT agree with your own model" in out
    assert "with rope_layout = 'half' the difference falls" in out
    assert json.loads(report.read_bytes())["levels"][0]["data"]["cause"]["words"] == "rope_layout = 'half'"
    (failure,) = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("failure")
    assert "rope_layout = 'half'" in (failure.text or "")
    assert main(only) == 2
    assert "add --expect FILE.safetensors" in capsys.readouterr().err


def test_without_a_file_every_verdict_says_so(
    bundle: Path, heldout_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["validate", str(bundle), "--text", str(heldout_text), "--level", "contract"]
    files = {name: tmp_path / f"report.{name}" for name in ("json", "html", "xml")}
    written = [("--report", "json"), ("--html", "html"), ("--junit", "xml")]
    assert main([*command, *(word for option, name in written for word in (option, str(files[name])))]) == 0
    out = capsys.readouterr().out
    assert f"parity: passed, {NOT_COMPARED}" in out
    assert f"when the bundle was built: {AGREES}" in out
    report = json.loads(files["json"].read_bytes())
    assert report["levels"][0]["level"] == OWN_MODEL
    assert report["levels"][0]["passed"] is None
    assert any(note.startswith(NOT_COMPARED) for note in report["notes"])
    assert f"{NOT_COMPARED.capitalize()}." in files["html"].read_text(encoding="utf-8")
    skipped = [case.get("message") for case in ElementTree.parse(files["xml"]).getroot().iter("skipped")]
    assert NOT_COMPARED in skipped


def test_a_comparison_that_is_no_longer_made_is_a_regression(bundle: Path) -> None:
    old = json.loads((bundle / "report.json").read_bytes())
    new = json.loads((bundle / "report.json").read_bytes())
    level = new["levels"][0]
    level.update(passed=None, checks=[{**level["checks"][0], "passed": None, "value": None, "limit": None}])
    before, after = ParityReport.from_dict(old), ParityReport.from_dict(new)
    (regression,) = compare_reports(before, after, names=("old", "new")).regressions
    assert (regression.level, regression.reason) == (OWN_MODEL, "was a gate, and is only reported")
    assert compare_reports(after, before, names=("new", "old")).passed


def test_the_level_needs_its_file_and_an_unvalidated_build_has_no_place_for_it(bundle: Path, expect: Path) -> None:
    with pytest.raises(InputError, match="needs the outputs of your own model"):
        validate_bundle(bundle, options=ParityOptions(levels=(OWN_MODEL,)))
    with pytest.raises(InputError, match="an unvalidated bundle has no report"):
        BuildOptions(checkpoint=bundle, output=bundle, expect=expect, validated=False)
