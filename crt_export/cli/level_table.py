"""The ladder as a table: what each level found about each target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crt_export.cli.console import write_table, write_text
from crt_export.ladder import OWN_MODEL
from crt_export.report.nearness import nearness

_COLUMNS = ("target", "level", "gates>", "closest to its limit", "value>", "limit>", "result")
_SHOWN_FAILURES = 20


def write_level_table(report: Mapping[str, Any], *, failures: bool = True) -> None:
    """Write a line per target and level, and below them what failed, unless the caller says that itself."""
    results = report.get("levels", [])
    if not results:
        return
    write_table(_COLUMNS, [_cells(result) for result in results], title="the ladder, level by level")
    if failures:
        _write_failures(results)


def _write_failures(results: Sequence[Mapping[str, Any]]) -> None:
    failures = [
        f"{result['target']} {result['level']}: {check['name']}: {failure}"
        for result in results
        for check in result["checks"]
        for failure in check["failures"]
    ]
    for failure in failures[:_SHOWN_FAILURES]:
        write_text(f"failed: {failure}")
    if len(failures) > _SHOWN_FAILURES:
        write_text(f"failed: {len(failures) - _SHOWN_FAILURES} more, all of them in the report (--json, --report)")


def _cells(result: Mapping[str, Any]) -> tuple[str, ...]:
    gates = [check for check in result["checks"] if check["passed"] is not None]
    held = sum(check["passed"] for check in gates)
    closest = max(_measured(gates), key=nearness, default=None)
    named = ("-", "-", "-") if closest is None else (closest["name"], _value(closest), f"{closest['limit']:g}")
    ungated = "not compared" if result["level"] == OWN_MODEL else "run"
    outcome = ungated if result["passed"] is None else "passed" if result["passed"] else "FAILED"
    return (result["target"], result["level"], f"{held}/{len(gates)}", *named, outcome)


def _measured(gates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [check for check in gates if check["limit"] and (check["value"] is not None or check["interval"])]


def _value(check: Mapping[str, Any]) -> str:
    if check["relation"] == "within" and check["interval"]:
        low, high = check["interval"]
        return f"[{low:+.1e}, {high:+.1e}]"
    return f"{check['value']:.3g}"
