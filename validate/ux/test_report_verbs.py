"""``crt-export report`` and ``compare`` on the report of a bundle that was really built."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from crt_export.parity import ParityReport
from crt_export.report.reading import report_schema

pytestmark = pytest.mark.slow

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def document(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "report.json").read_text(encoding="utf-8"))


def test_the_report_of_a_bundle_fits_the_published_schema(document: dict[str, Any]) -> None:
    errors = jsonschema.Draft202012Validator(report_schema()).iter_errors(document)
    assert [f"{error.json_path}: {error.message}" for error in errors] == []


def test_report_writes_one_page_and_junit_of_a_bundle(
    crt_export: Run, bundle: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    result = crt_export("report", str(bundle), "--output", "report.html", "--junit", "junit.xml")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert all(target in page for target in ParityReport.from_dict(document).targets)
    assert f"<dd>{bundle.name}</dd>" in page
    suites = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (int(suites.get("tests", 0)) > 10, suites.get("failures")) == (True, "0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["junit.xml", "report.html"]


def test_report_refuses_an_output_in_no_folder_before_it_reads(crt_export: Run, bundle: Path, tmp_path: Path) -> None:
    result = crt_export("report", str(bundle), "--output", "absent/report.html")
    assert result.returncode == 2
    assert "does not exist" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_report_is_exit_2_with_one_error(crt_export: Run, document: dict[str, Any], tmp_path: Path) -> None:
    document["levels"][1]["checks"][0]["value"] = "many"
    (tmp_path / "report.json").write_text(json.dumps(document), encoding="utf-8")
    for arguments in (("report", "report.json", "--output", "x.html"), ("compare", "report.json", "report.json")):
        result = crt_export(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert "report.levels[1].checks[0].value: expected number or null, found 'many'" in result.stderr


def test_compare_passes_a_bundle_against_its_own_report(crt_export: Run, bundle: Path) -> None:
    result = crt_export("compare", str(bundle / "report.json"), str(bundle))
    assert result.returncode == 0, result.stderr
    assert "compare: no regression in" in result.stdout


def test_compare_fails_with_exit_1_names_what_regressed_and_writes_junit(
    crt_export: Run, bundle: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    level = next(r for r in document["levels"] if (r["target"], r["level"]) == ("ort-cpu-int8", "corpus"))
    checks = {check["name"]: check for check in level["checks"]}
    checks["step: mean_kl"].update(passed=False, failures=["damaged"])
    checks["step: relative_logit_error"].update(value=0.019, interval=[0.0185, 0.0195])  # within its limit of 0.02
    (tmp_path / "new.json").write_text(json.dumps(document), encoding="utf-8")
    result = crt_export("compare", str(bundle), "new.json", "--junit", "junit.xml", "--json")
    assert result.returncode == 1, result.stderr
    comparison = json.loads(result.stdout)
    failed = {change["name"] for change in comparison["changes"] if change["verdict"] == "regressed"}
    assert {name.rpartition(": ")[2] for name in failed} == {"mean_kl", "relative_logit_error"}
    assert ElementTree.parse(tmp_path / "junit.xml").getroot().get("failures") == "2"
    plain = crt_export("compare", str(bundle), "new.json")
    assert plain.returncode == 1
    assert "damaged" in plain.stdout
    assert "compare: FAILED, 2 regressions" in plain.stdout


def test_compare_refuses_reports_of_other_texts_with_exit_2(
    crt_export: Run, bundle: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    document["text"]["sha256"] = "0" * 64
    (tmp_path / "new.json").write_text(json.dumps(document), encoding="utf-8")
    result = crt_export("compare", str(bundle), "new.json")
    assert (result.returncode, result.stdout) == (2, "")
    assert "the text's sha256" in result.stderr
    assert str(bundle) in result.stderr
    assert "new.json" in result.stderr
