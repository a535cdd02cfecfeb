"""Readers of reports: a ``report.json``, the one that a bundle holds, or the JSON of a benchmark.

Documents are held against their published schemas, ``validate/report.schema.json`` and ``validate/bench.schema.json``,
by ``jsonschema`` (extra ``report``). Where only the core is installed, a report of a validation is read all the same:
its record refuses missing and unknown keys.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from crt_export.catalog import definition_path
from crt_export.environment import find_dependency, require_extra
from crt_export.errors import BundleError, InputError, problem_list
from crt_export.parity.report import ParityReport
from crt_export.user_files import read_input

if TYPE_CHECKING:
    from jsonschema import ValidationError

    from crt_export.bundle import BundleFiles

_MAX_BYTES = 256 << 20
_SHOWN_PROBLEMS = 10


class _Format(NamedTuple):
    """A kind of document: its schema's file, its name, how one is made, and the verb that makes another."""

    schema: str
    name: str
    source: str
    verb: str


_REPORT = _Format(
    "report.schema.json",
    "a parity report",
    "crt-export validate --report FILE.json, or report.json of a bundle",
    "validate",
)
_BENCH = _Format("bench.schema.json", "a benchmark", "crt-export bench BUNDLE --output FILE.json", "measure")


@cache
def _schema(name: str) -> dict[str, Any]:
    return json.loads(definition_path("validate", name).read_text(encoding="utf-8"))


def report_schema() -> dict[str, Any]:
    """The schema of parity reports as it is published; treat it as read-only.

    Raises:
        MissingDependencyError: The installation lacks the file.
    """
    return _schema(_REPORT.schema)


def bench_schema() -> dict[str, Any]:
    """Likewise the schema of benchmarks.

    Raises:
        MissingDependencyError: The installation lacks the file.
    """
    return _schema(_BENCH.schema)


def read_document(path: Path) -> ParityReport | dict[str, Any]:
    """Read a report of a validation, or the JSON of a benchmark, whichever it is.

    Args:
        path: A JSON file, or the folder of a bundle.

    Raises:
        InputError: The file cannot be read, is neither, or is one of another version; names what was expected.
        BundleError: As :func:`read_report`.
    """
    if path.is_dir():
        return read_report(path)
    document = _json_of_file(path)
    if isinstance(document, dict) and document.get("format") == bench_schema()["properties"]["format"]["const"]:
        return checked_bench(document, str(path))
    return checked_report(document, str(path))


def read_bench(path: Path) -> dict[str, Any]:
    """Read a benchmark and hold it against its schema.

    Raises:
        InputError: The file cannot be read, is no benchmark, or is one of another version.
    """
    return checked_bench(_json_of_file(path, _BENCH), str(path))


def checked_bench(document: object, where: str) -> dict[str, Any]:
    """The document if it is a benchmark of this version.

    Args:
        document: What was parsed from JSON.
        where: The file, for errors.

    Raises:
        InputError: It is none; lists what is wrong.
        MissingDependencyError: jsonschema is not installed.
    """
    require_extra(("jsonschema",), "reading a benchmark")
    checked = _of_this_version(document, _BENCH, where)
    _refuse_problems(checked, _BENCH, where)
    return checked


def bench_path(bundle: Path) -> Path:
    """Where the benchmark of a bundle is looked for: beside it, with ``.bench.json`` after its name."""
    place = Path(os.path.realpath(bundle))
    return place.with_name(f"{place.name}.bench.json")


def bench_of_bundle(files: BundleFiles, path: Path) -> dict[str, Any]:
    """The benchmark in a file, if it measured this very bundle.

    Raises:
        InputError: As :func:`read_bench`, or it measured another bundle, such as an earlier build of this one.
        MissingDependencyError: jsonschema is not installed.
    """
    document = read_bench(path)
    measured = document["bundle"].get("sha256")
    if measured != files.identity:
        raise InputError(
            f"{path} measured another bundle than {files.path}: expected identity {files.identity}, found "
            f"{measured!r:.80}; measure this one: crt-export bench {files.path} --output {path}"
        )
    return document


def read_report(path: Path) -> ParityReport:
    """Read a report and hold it against its schema.

    Args:
        path: A ``report.json``, or the folder of a bundle, validated or not.

    Raises:
        InputError: The file cannot be read, is no report, or is one of another version; names what was expected.
        BundleError: The folder is no bundle, or its bundle was built without a report.
    """
    if not path.is_dir():
        return checked_report(_json_of_file(path), str(path))
    from crt_export.bundle import open_bundle

    report = report_of_bundle(open_bundle(path, allow_unvalidated=True))
    if report is None:
        raise BundleError(
            f"{path} was built without validation (--unvalidated), so it holds no report: make one with "
            f"'crt-export validate {path} --report FILE.json'"
        )
    return report


def report_of_bundle(files: BundleFiles) -> ParityReport | None:
    """The report that a bundle holds; None where it was built without validation.

    Raises:
        InputError: It holds a file that is no report, or one of another version.
        BundleError: The file is missing or was changed.
    """
    parity = files.manifest["parity"]
    if parity is None or "report" not in parity:
        return None
    name = parity["report"]
    if not isinstance(name, str):
        raise InputError(f"{files.path}: parity.report must be the name of a file, found {name!r:.60}")
    return checked_report(_parsed(bytes(files.content(name)), f"{files.path}/{name}", _REPORT), f"{files.path}/{name}")


def checked_report(document: object, where: str) -> ParityReport:
    """The document if it is a report of this version.

    Args:
        document: What was parsed from JSON.
        where: The file, for errors.

    Raises:
        InputError: It is none; lists what is wrong.
    """
    checked = _of_this_version(document, _REPORT, where)
    if find_dependency("jsonschema").usable:
        _refuse_problems(checked, _REPORT, where)
    try:
        return ParityReport.from_dict(checked)
    except InputError as error:
        raise InputError(f"{_damaged(_REPORT, where)}: {error}") from None


def _of_this_version(document: object, form: _Format, where: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise InputError(f"{where}: expected {form.name} ({form.source}), found {type(document).__name__}")
    expected = {key: _schema(form.schema)["properties"][key]["const"] for key in ("format", "format_version")}
    found = {key: document.get(key) for key in expected}
    if found["format"] != expected["format"]:
        raise InputError(f"{where}: expected {form.name} ({form.source}), found format {found['format']!r:.60}")
    if found["format_version"] != expected["format_version"] or isinstance(found["format_version"], bool):
        raise InputError(
            f"{where} is {form.name} of version {found['format_version']!r:.60}; this crt-export reads version "
            f"{expected['format_version']}: use the crt-export that wrote it, or {form.verb} again with this one"
        )
    return document


def _damaged(form: _Format, where: str) -> str:
    return f"{where}: {form.name} that is damaged or of a newer crt-export"


def schema_problems(document: Any, schema: Mapping[str, Any], where: str = "report") -> Iterator[str]:
    """What is wrong with a document, one sentence each with the place; nothing where it fits the schema.

    Args:
        document: What was parsed from JSON.
        schema: Its schema.
        where: What the document is called in the sentences.
    """
    from jsonschema import Draft202012Validator

    for error in Draft202012Validator(schema).iter_errors(document):
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        yield f"{where}{place}: {_sentence(error)}"


def _sentence(error: ValidationError) -> str:
    expected, found = error.validator_value, f"{error.instance!r:.60}"
    match error.validator:
        case "type":
            return f"expected {expected if isinstance(expected, str) else ' or '.join(_words(expected))}, found {found}"
        case "const":
            return f"expected {expected!r}, found {found}"
        case "enum":
            return f"expected one of {', '.join(map(repr, _words(expected)))}, found {found}"
        case "required":
            return f"no {error.message.partition(' is a required')[0]}"
        case "additionalProperties":
            known = error.schema.get("properties", {}) if isinstance(error.schema, Mapping) else {}
            return ", ".join(f"unknown key {key!r}" for key in _words(error.instance) if key not in known)
        case "minimum":
            return f"expected at least {expected}, found {found}"
        case "minItems" | "maxItems":
            return f"expected {expected} items, found {len(_words(error.instance))}"
        case _:
            return f"fits none of the forms it may have, found {found}"


def _words(value: Any) -> list[str]:
    return list(value) if isinstance(value, Iterable) else []


def _refuse_problems(document: dict[str, Any], form: _Format, where: str) -> None:
    problems = list(itertools.islice(schema_problems(document, _schema(form.schema)), _SHOWN_PROBLEMS + 1))
    if problems:
        if len(problems) > _SHOWN_PROBLEMS:
            problems[-1] = "and more"
        raise InputError(problem_list(_damaged(form, where), problems))


def _json_of_file(path: Path, form: _Format = _REPORT) -> object:
    try:
        content = read_input(path, most=_MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): expected {form.name} ({form.source})") from None
    return _parsed(content, str(path), form)


def _parsed(content: bytes, where: str, form: _Format) -> object:
    try:
        return json.loads(content, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded)
    except RecursionError:
        raise InputError(f"{where} is nested too deeply: expected {form.name} ({form.source})") from None
    except ValueError as error:  # of JSON, of UTF-8, of numbers
        raise InputError(f"{where} is not JSON ({error}): expected {form.name} ({form.source})") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond the range of floats")
    return value


def _bounded(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**63
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{text[:20]}... is beyond 64 bits")
    return value
