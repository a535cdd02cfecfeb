"""The published schema of reports, and reading a report against it."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from crt_export.bundle import MANIFEST_NAME
from crt_export.errors import BundleError, InputError
from crt_export.ladder import LEVELS
from crt_export.parity import ParityReport, ParityRow
from crt_export.parity.level import Check, LevelResult
from crt_export.parity.report import FORMAT, FORMAT_VERSION
from crt_export.report.reading import checked_report, read_report
from crt_export.report.schema import report_schema, schema_problems

#: What the package's own reader of the schema understands.
KEYWORDS = {
    "$schema", "$id", "$defs", "$ref", "title", "description", "type", "properties", "required", "const", "enum",
    "additionalProperties", "items", "minItems", "maxItems", "minimum", "anyOf", "allOf", "if", "then",
}  # fmt: skip


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(report_schema())
    return jsonschema.Draft202012Validator(report_schema())


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object of the schema that is a schema itself, and not a table of schemas by name."""
    yield schema
    for key in ("properties", "$defs"):
        for part in schema.get(key, {}).values():
            yield from subschemas(part)
    for key in ("items", "additionalProperties", "if", "then"):
        if isinstance(schema.get(key), dict):
            yield from subschemas(schema[key])
    for key in ("anyOf", "allOf"):
        for part in schema.get(key, []):
            yield from subschemas(part)


def test_a_full_report_fits_the_schema(
    validator: jsonschema.Draft202012Validator, sample_report: dict[str, Any]
) -> None:
    assert [error.message for error in validator.iter_errors(sample_report)] == []
    assert list(schema_problems(sample_report)) == []
    assert ParityReport.from_dict(sample_report).to_dict() == sample_report


def test_the_schema_names_every_key_that_the_package_writes() -> None:
    def keys(kind: Any) -> set[str]:
        return {entry.name for entry in dataclasses.fields(kind)}

    schema, parts = report_schema(), report_schema()["$defs"]
    assert set(schema["properties"]) == keys(ParityReport) | {"format", "format_version", "passed"}
    assert set(parts["row"]["properties"]) == keys(ParityRow)
    assert set(parts["check"]["properties"]) == keys(Check)
    assert set(parts["level"]["properties"]) == keys(LevelResult) | {"passed"}
    assert tuple(parts["level"]["properties"]["level"]["enum"]) == LEVELS
    for level, branch in zip(LEVELS, parts["level"]["allOf"], strict=True):
        assert branch["if"]["properties"]["level"]["const"] == level
        assert branch["then"]["properties"]["data"]["$ref"] == f"#/$defs/{level}"
    consts = {key: schema["properties"][key]["const"] for key in ("format", "format_version")}
    assert consts == {"format": FORMAT, "format_version": FORMAT_VERSION}


def test_the_schema_uses_no_keyword_that_the_package_would_ignore() -> None:
    used = {key for part in subschemas(report_schema()) for key in part}
    assert used <= KEYWORDS


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    if isinstance(value, dict):
        return [(value, key) for key in value] + [place for item in value.values() for place in places(item)]
    if isinstance(value, list):
        return [(value, i) for i in range(len(value))] + [place for item in value for place in places(item)]
    return []


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_judged_as_jsonschema_judges_it(
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
    problems = list(schema_problems(sample_report))
    assert (not problems) == expected, problems


def test_true_is_no_number_and_a_whole_float_is_an_integer(sample_report: dict[str, Any]) -> None:
    sample_report["rows"][0]["tokens"] = 4096.0
    assert list(schema_problems(sample_report)) == []
    sample_report["rows"][0]["tokens"] = True
    sample_report["format_version"] = True
    assert len(list(schema_problems(sample_report))) == 2


def test_a_report_is_read_back_as_it_was_written(sample_report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(sample_report), encoding="utf-8")
    assert read_report(path) == sample_report


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
        (b'{"rows": [], "tolerances": {}, "text": {}}', "from before reports had a version"),
        (b'{"format": "crt-export parity report", "format_version": 1}', "no 'rows'"),
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
    damaged["rows"][0]["unknown"] = 1
    with pytest.raises(InputError) as caught:
        checked_report(damaged, "old.json")
    assert "no 'notes'" in str(caught.value)
    assert "unknown key 'unknown'" in str(caught.value)
    damaged["rows"] = [{}] * 50
    with pytest.raises(InputError) as caught:
        checked_report(damaged, "old.json")
    assert str(caught.value).count("\n") < 15


def test_missing_files_and_folders_that_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_report(tmp_path / "absent.json")
    with pytest.raises(BundleError, match=MANIFEST_NAME):
        read_report(tmp_path)
