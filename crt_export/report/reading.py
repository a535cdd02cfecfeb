"""Read a report: a ``report.json``, the one that a bundle holds, or the JSON of a benchmark."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from crt_export.errors import BundleError, InputError, problem_list
from crt_export.report.schema import bench_schema, report_schema, schema_problems
from crt_export.user_files import read_input

_MAX_BYTES = 256 << 20
_SHOWN_PROBLEMS = 10
_KIND = "a parity report (crt-export validate --report FILE.json, or report.json of a bundle)"
_BENCH_KIND = "a benchmark (crt-export bench BUNDLE --output FILE.json)"
BENCH_FORMAT = "crt-export-bench"


def read_document(path: Path) -> dict[str, Any]:
    """Read a report of a validation or a benchmark, whichever it is.

    Args:
        path: A JSON file, or the folder of a bundle.

    Raises:
        InputError: The file cannot be read, is neither, or is one of another version; names what was expected.
        BundleError: As :func:`read_report`.
    """
    if path.is_dir():
        return _report_of_bundle(path)
    document = _json_of_file(path)
    if isinstance(document, dict) and document.get("format") == BENCH_FORMAT:
        return checked_bench(document, str(path))
    return checked_report(document, str(path))


def read_bench(path: Path) -> dict[str, Any]:
    """Read a benchmark and hold it against its schema.

    Raises:
        InputError: The file cannot be read, is no benchmark, or is one of another version.
    """
    return checked_bench(_json_of_file(path, _BENCH_KIND), str(path))


def checked_bench(document: object, where: str) -> dict[str, Any]:
    """The document if it is a benchmark of this version.

    Args:
        document: What was parsed from JSON.
        where: The file, for errors.

    Raises:
        InputError: It is none; lists what is wrong.
    """
    found = document.get("format") if isinstance(document, dict) else type(document).__name__
    if not isinstance(document, dict) or found != BENCH_FORMAT:
        raise InputError(f"{where}: expected {_BENCH_KIND}, found {found!r:.60}")
    version, expected = document.get("format_version"), bench_schema()["properties"]["format_version"]["const"]
    if version != expected or isinstance(version, bool):
        raise InputError(
            f"{where} is a benchmark of version {version!r:.60}; this crt-export reads version {expected}: use the "
            "crt-export that wrote it, or measure again with this one"
        )
    _refuse_problems(document, bench_schema(), f"{where}: a benchmark that is damaged or of a newer crt-export")
    return document


def read_report(path: Path) -> dict[str, Any]:
    """Read a report and hold it against its schema.

    Args:
        path: A ``report.json``, or the folder of a bundle, validated or not.

    Returns:
        The document; every key of ``validate/report.schema.json`` is there and of its type.

    Raises:
        InputError: The file cannot be read, is no report, or is one of another version; names what was expected.
        BundleError: The folder is no bundle, or its bundle was built without a report.
    """
    if path.is_dir():
        return _report_of_bundle(path)
    document = _json_of_file(path)
    return checked_report(document, str(path))


def checked_report(document: object, where: str) -> dict[str, Any]:
    """The document if it is a report of this version.

    Args:
        document: What was parsed from JSON.
        where: The file, for errors.

    Raises:
        InputError: It is none; lists what is wrong.
    """
    if not isinstance(document, dict):
        raise InputError(f"{where}: expected {_KIND}, found {type(document).__name__}")
    if "format" not in document and {"rows", "tolerances", "text"} <= set(document):
        raise InputError(
            f"{where} is a parity report from before reports had a version: validate the bundle again with this "
            "crt-export"
        )
    expected = {key: report_schema()["properties"][key]["const"] for key in ("format", "format_version")}
    found = {key: document.get(key) for key in expected}
    if found["format"] != expected["format"]:
        raise InputError(f"{where}: expected {_KIND}, found format {found['format']!r:.60}")
    if found["format_version"] != expected["format_version"] or isinstance(found["format_version"], bool):
        raise InputError(
            f"{where} is a parity report of version {found['format_version']!r:.60}; this crt-export reads version "
            f"{expected['format_version']}: use the crt-export that wrote it, or validate again with this one"
        )
    _refuse_problems(document, report_schema(), f"{where}: a parity report that is damaged or of a newer crt-export")
    return document


def _refuse_problems(document: dict[str, Any], schema: Mapping[str, Any], heading: str) -> None:
    problems = list(itertools.islice(schema_problems(document, schema), _SHOWN_PROBLEMS + 1))
    if problems:
        if len(problems) > _SHOWN_PROBLEMS:
            problems[-1] = "and more"
        raise InputError(problem_list(heading, problems))


def _report_of_bundle(folder: Path) -> dict[str, Any]:
    from crt_export.bundle import open_bundle

    parity = open_bundle(folder, allow_unvalidated=True).manifest["parity"]
    if parity is None:
        raise BundleError(
            f"{folder} was built without validation (--unvalidated), so it holds no report: make one with "
            f"'crt-export validate {folder} --report FILE.json'"
        )
    return checked_report(parity, f"the report of {folder}")


def _json_of_file(path: Path, kind: str = _KIND) -> object:
    try:
        content = read_input(path, most=_MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): expected {kind}") from None
    try:
        return json.loads(content, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded)
    except RecursionError:
        raise InputError(f"{path} is nested too deeply: expected {kind}") from None
    except ValueError as error:  # of JSON, of UTF-8, of numbers
        raise InputError(f"{path} is not JSON ({error}): expected {kind}") from None


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
