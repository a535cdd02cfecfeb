"""What a report says of the user's own model, in words: part of every verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from crt_export.ladder import NOT_COMPARED, OWN_MODEL


def own_model_text(report: Mapping[str, Any] | None) -> str:
    """The outcome of the level ``own-model``, as it goes on after "passed, ".

    Args:
        report: The document of a report; None where nothing was validated.

    Returns:
        ``not compared with your own model``, or that it agrees or not, with the figure, positions and regime.
    """
    result = _result(report)
    if result is None or result["passed"] is None:
        return NOT_COMPARED
    verb = "agrees" if result["passed"] else "does NOT agree"
    figures = ", ".join(_figures(result))
    return f"{verb} with your own model{f' ({figures})' if figures else ''}"


def was_compared(report: Mapping[str, Any] | None) -> bool:
    """Whether there was anything of the user's own model to compare with."""
    result = _result(report)
    return result is not None and result["passed"] is not None


def _result(report: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    levels = (report or {}).get("levels", ())
    return next((result for result in levels if result["level"] == OWN_MODEL), None)


def _figures(result: Mapping[str, Any]) -> Iterator[str]:
    """What the schema lets a report leave out is left out."""
    failed = (check for check in result["checks"] if check["passed"] is False)
    check = next(failed, next(iter(result["checks"]), None))
    if check is not None and check["value"] is not None:
        yield f"largest difference of {check['name']} {check['value']:.1e} of their deviation"
    if check is not None and check["limit"] is not None:
        yield f"limit {check['limit']:g}"
    data = result["data"]
    if "positions" in data:
        yield f"{data['positions']:,} positions"
    if "passes" in data:
        yield "exact recurrence" if data["passes"] == "exact" else f"{data['passes']} passes"
