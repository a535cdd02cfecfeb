"""Verdict of a report: what is said first, on a page, in a terminal and to CI systems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from crt_export.parity.levels import LEVELS, NOT_COMPARED, OWN_MODEL
from crt_export.parity.metrics import Check
from crt_export.parity.report import COMPILED, LevelResult, ParityReport
from crt_export.report.numbers import count_text

PASSED, FAILED, REPORTED, NOT_RUN = "passed", "failed", "reported", "not run"


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


def verdict_of(report: ParityReport) -> Verdict:
    """The verdict of a report."""
    good, gates = gates_held([check for result in report.levels for check in result.checks])
    scope = count_text(len([name for name in report.targets if not name.startswith("pytorch-")]), "target")
    if not gates:
        summary = f"Nothing was gated on {scope}, so nothing has been shown."
    elif good < gates:
        summary = f"{gates - good:,} of {count_text(gates, 'gate')} failed on {scope}."
    elif gates == 1:
        summary = f"The only gate held, on {scope}."
    else:
        summary = f"All {count_text(gates, 'gate')} held on {scope}."
    own_model = own_model_text(report)
    engines = [row for row in report.rows if row.status == COMPILED]
    caveat = ""
    if engines:
        names = ", ".join(dict.fromkeys(row.target for row in engines))
        caveat = (
            f"{count_text(len(engines), 'compiled engine')} ({names}) did not run where this report was made: "
            "the ONNX graphs they were compiled from did."
        )
    return Verdict(
        passed=report.passed,
        summary=summary,
        own_model=f"{own_model[0].upper()}{own_model[1:]}.",
        first=next(iter(failures_of(report)), None),
        caveat=caveat,
    )


def failures_of(report: ParityReport) -> list[Failure]:
    """Every failed gate, in the order of the ladder."""
    return [
        Failure(place=f"{result.target} {result.level}, {check.name}:", sentence=next(iter(check.failures), "failed"))
        for result in report.levels
        for check in result.checks
        if check.passed is False
    ]


def levels_of(report: ParityReport) -> list[str]:
    """The levels that ran, in the order of the ladder."""
    ran = {result.level for result in report.levels}
    return [level for level in LEVELS if level in ran]


def gates_held(checks: Sequence[Check]) -> tuple[int, int]:
    """How many gates held, and how many there were."""
    gates = [check.passed for check in checks if check.passed is not None]
    return sum(gates), len(gates)


def target_checks(report: ParityReport, target: str) -> list[Check]:
    """Every check of a target, in the order of the ladder."""
    return [check for result in report.levels if result.target == target for check in result.checks]


def outcome(passed: bool | None) -> str:
    """A verdict as a word."""
    return REPORTED if passed is None else PASSED if passed else FAILED


# --- the user's own model
def own_model_text(report: ParityReport | None) -> str:
    """The outcome of the level ``own-model``, as it goes on after "passed, ".

    Args:
        report: The report; None where nothing was validated.

    Returns:
        ``not compared with your own model``, or that it agrees or not, with the figure, positions and regime.
    """
    result = _own_model(report)
    if result is None or result.passed is None:
        return NOT_COMPARED
    verb = "agrees" if result.passed else "does NOT agree"
    figures = ", ".join(_figures(result))
    return f"{verb} with your own model{f' ({figures})' if figures else ''}"


def was_compared(report: ParityReport | None) -> bool:
    """Whether there was anything of the user's own model to compare with."""
    result = _own_model(report)
    return result is not None and result.passed is not None


def _own_model(report: ParityReport | None) -> LevelResult | None:
    levels = () if report is None else report.levels
    return next((result for result in levels if result.level == OWN_MODEL), None)


def _figures(result: LevelResult) -> Iterator[str]:
    """What the schema lets a report leave out is left out."""
    failed = (check for check in result.checks if check.passed is False)
    check = next(failed, next(iter(result.checks), None))
    if check is not None and check.value is not None:
        yield f"largest difference of {check.name} {check.value:.1e} of their deviation"
    if check is not None and check.limit is not None:
        yield f"limit {check.limit:g}"
    data = result.data
    if "positions" in data:
        yield f"{data['positions']:,} positions"
    if "passes" in data:
        yield "exact recurrence" if data["passes"] == "exact" else f"{data['passes']} passes"
