"""The published schema of reports, and reading a report against it."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from crt_export import environment
from crt_export.bundle import MANIFEST_NAME
from crt_export.errors import BundleError, InputError, MissingDependencyError
from crt_export.parity.levels import LEVELS
from crt_export.parity.metrics import METRICS, Check
from crt_export.parity.report import FORMAT, FORMAT_VERSION, Comparison, LevelResult, ParityReport
from crt_export.report.reading import checked_bench, checked_report, read_report, report_schema, schema_problems


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(report_schema())
    return jsonschema.Draft202012Validator(report_schema())


def test_a_full_report_fits_the_schema(
    validator: jsonschema.Draft202012Validator, sample_report: dict[str, Any]
) -> None:
    assert [error.message for error in validator.iter_errors(sample_report)] == []
    assert list(schema_problems(sample_report, report_schema())) == []
    assert ParityReport.from_dict(sample_report).to_dict() == sample_report


def test_the_schema_names_every_key_that_the_package_writes() -> None:
    def keys(kind: Any) -> set[str]:
        return {entry.name for entry in dataclasses.fields(kind)}

    schema, parts = report_schema(), report_schema()["$defs"]
    assert set(schema["properties"]) == keys(ParityReport) | {"format", "format_version", "passed"}
    regime = set(parts["corpus"]["properties"]["regimes"]["additionalProperties"]["properties"])
    assert keys(Comparison) - {"target", "label", "checks", "statistics"} <= regime
    assert not regime & (keys(Check) | {"delta_nll", "mean_kl"})  # figures stand in the checks
    assert set(parts["check"]["properties"]) == keys(Check)
    assert parts["check"]["properties"]["metric"]["enum"] == ["", *METRICS]
    assert set(parts["level"]["properties"]) == keys(LevelResult) | {"passed"}
    assert tuple(parts["level"]["properties"]["level"]["enum"]) == LEVELS
    for level, branch in zip(LEVELS, parts["level"]["allOf"], strict=True):
        assert branch["if"]["properties"]["level"]["const"] == level
        assert branch["then"]["properties"]["data"]["$ref"] == f"#/$defs/{level}"
    consts = {key: schema["properties"][key]["const"] for key in ("format", "format_version")}
    assert consts == {"format": FORMAT, "format_version": FORMAT_VERSION}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    if isinstance(value, dict):
        return [(value, key) for key in value] + [place for item in value.values() for place in places(item)]
    if isinstance(value, list):
        return [(value, i) for i in range(len(value))] + [place for item in value for place in places(item)]
    return []


@pytest.mark.parametrize("seed", range(40))
def test_every_damage_is_said_in_a_sentence_with_its_place(
    validator: jsonschema.Draft202012Validator, make_report: Callable[..., dict[str, Any]], seed: int
) -> None:
    chosen = random.Random(seed)
    sample_report = make_report(targets=1, levels=tuple(chosen.sample(LEVELS[1:], 2)))
    container, key = chosen.choice(places(sample_report))
    replacement = chosen.choice([None, True, 1, 1.0, -1, 0.5, "x", [], {}, [None, 1.0], [1, 2, 3], "absent", "added"])
    if replacement == "absent":
        del container[key]
    elif replacement == "added" and isinstance(container, dict):
        container["added"] = 1
    else:
        container[key] = replacement
    expected = validator.is_valid(sample_report)
    problems = list(schema_problems(sample_report, report_schema()))
    assert (not problems) == expected, problems
    if not expected:
        assert all(problem.startswith("report") and ": " in problem for problem in problems)


def test_true_is_no_number_and_a_whole_float_is_an_integer(sample_report: dict[str, Any]) -> None:
    regime = next(level for level in sample_report["levels"] if level["level"] == "corpus")["data"]["regimes"]["step"]
    regime["tokens"] = 4096.0
    assert list(schema_problems(sample_report, report_schema())) == []
    regime["tokens"] = True
    sample_report["format_version"] = True
    assert len(list(schema_problems(sample_report, report_schema()))) == 2


def test_a_report_is_read_back_as_it_was_written(sample_report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(sample_report), encoding="utf-8")
    assert read_report(path).to_dict() == sample_report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"format": ', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1e999}', "beyond the range of floats"),
        (b'{"a": ' + b"9" * 5000 + b"}", "beyond 64 bits"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "found list"),
        (b"{}", "found format None"),
        (b'{"format": "something else", "format_version": 1}', "found format 'something else'"),
        (b'{"format": "crt-export parity report", "format_version": 2}', "of version 2; this crt-export reads version"),
        (b'{"format": "crt-export parity report", "format_version": true}', "of version True"),
        (b'{"rows": [], "tolerances": {}, "text": {}}', "found format None"),
        (b'{"format": "crt-export parity report", "format_version": 1}', "no 'levels'"),
    ],
)
def test_what_is_no_report_is_refused_with_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_report(path)
    assert str(path) in str(caught.value)


def test_all_problems_are_listed_up_to_a_dozen(sample_report: dict[str, Any]) -> None:
    damaged = copy.deepcopy(sample_report)
    del damaged["notes"]
    damaged["levels"][0]["unknown"] = 1
    with pytest.raises(InputError) as caught:
        checked_report(damaged, "old.json")
    assert "no 'notes'" in str(caught.value)
    assert "unknown key 'unknown'" in str(caught.value)
    damaged["levels"] = [{}] * 50
    with pytest.raises(InputError) as caught:
        checked_report(damaged, "old.json")
    assert str(caught.value).count("\n") < 15


def test_missing_files_and_folders_that_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_report(tmp_path / "absent.json")
    with pytest.raises(BundleError, match=MANIFEST_NAME):
        read_report(tmp_path)


def test_a_report_is_read_where_jsonschema_is_not_installed(
    sample_report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """compare and JUnit need the core only; the page and benchmarks need the extra."""
    monkeypatch.setattr(environment.Dependency, "usable", property(lambda self: self.distribution != "jsonschema"))
    assert checked_report(sample_report, "old.json").to_dict() == sample_report
    with pytest.raises(InputError, match="unknown key 'verdict'"):
        checked_report({**sample_report, "verdict": "fine"}, "old.json")
    del sample_report["levels"][1]["checks"][0]["name"]
    with pytest.raises(InputError, match="a level cannot be read"):
        checked_report(sample_report, "old.json")
    with pytest.raises(MissingDependencyError, match=r"jsonschema 4\.23 or newer.*crt-export\[report\]"):
        checked_bench({}, "bench.json")
