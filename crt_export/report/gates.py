"""What was judged: the gates of a report as cases, counted as readers want them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crt_export.ladder import LEVELS
from crt_export.report.junit import JUnitCase, junit_cases
from crt_export.report.numbers import count_text
from crt_export.report.own_model import own_model_text


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A gate that failed: where (target, level, check) and its first sentence."""

    place: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is said first.

    Attributes:
        passed: Whether everything that was gated held, and something was.
        summary: One sentence: how many gates, of what.
        first: What failed first, on the lowest level; None where nothing did.
        own_model: Whether the reference was compared with the user's own model, and how they agree.
        caveat: What has not been judged though it is deployed; empty where there is nothing.
    """

    passed: bool
    summary: str
    own_model: str
    first: Failure | None = None
    caveat: str = ""


def verdict_of(report: Mapping[str, Any]) -> Verdict:
    """The verdict of a report, from its document."""
    cases = junit_cases(report)
    gates = [case for case in cases if case.skipped is None]
    failed = [case for case in gates if case.failures]
    targets = {result["target"] for result in report["levels"]} | {row["target"] for row in report["rows"]}
    scope = count_text(len([name for name in targets if not name.startswith("pytorch-")]), "target")
    if not gates:
        summary = f"Nothing was gated on {scope}, so nothing has been shown."
    elif failed:
        summary = f"{len(failed):,} of {count_text(len(gates), 'gate')} failed on {scope}."
    elif len(gates) == 1:
        summary = f"The only gate held, on {scope}."
    else:
        summary = f"All {count_text(len(gates), 'gate')} held on {scope}."
    own_model = own_model_text(report)
    engines = [row for row in report["rows"] if row["status"] != "run"]
    caveat = ""
    if engines:
        names = ", ".join(dict.fromkeys(row["target"] for row in engines))
        caveat = (
            f"{count_text(len(engines), 'compiled engine')} ({names}) did not run where this report was made: "
            "the ONNX graphs they were compiled from did."
        )
    return Verdict(
        passed=bool(report["passed"]) and bool(gates) and not failed,
        summary=summary,
        own_model=f"{own_model[0].upper()}{own_model[1:]}.",
        first=_failure(failed[0]) if failed else None,
        caveat=caveat,
    )


def failures_of(report: Mapping[str, Any]) -> list[Failure]:
    """Every failed gate, in the order of the ladder."""
    return [_failure(case) for case in junit_cases(report) if case.failures]


def levels_of(report: Mapping[str, Any]) -> list[str]:
    """The levels that ran, in the order of the ladder."""
    ran = {result["level"] for result in report["levels"]}
    return [level for level in LEVELS if level in ran]


def targets_of(report: Mapping[str, Any]) -> list[str]:
    """Targets in the order they appear, the reference models last."""
    names = list(dict.fromkeys(entry["target"] for entry in (*report["levels"], *report["rows"])))
    return sorted(names, key=lambda name: name.startswith("pytorch-"))


def held(checks: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many gates held, and how many there were."""
    gates = [check["passed"] for check in checks if check["passed"] is not None]
    return sum(gates), len(gates)


def _failure(case: JUnitCase) -> Failure:
    return Failure(place=f"{case.suite}, {case.name}:", sentence=case.failures[0])
