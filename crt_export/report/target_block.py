"""One target of a report as the HTML template shows it: its rows and its checks, with a limit beside each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crt_export.ladder import CORPUS
from crt_export.report.gates import held
from crt_export.report.nearness import nearness
from crt_export.report.numbers import interval_text, number_text, share_text

PASSED, FAILED, REPORTED, NOT_RUN = "passed", "failed", "reported", "not run"
#: Checks that a level shows before the table of all of them.
_SHOWN_CHECKS = 5
_SHOWN_FAILURES = 20


@dataclass(frozen=True, kw_only=True)
class CheckLine:
    """One check: text of every cell, and how it came out (``passed``, ``failed``, ``reported``)."""

    name: str
    figure: str
    value: str
    interval: str
    limit: str
    tolerance: str
    result: str
    failures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LevelBlock:
    """A level of a target: its checks that matter first, and all of them."""

    level: str
    result: str
    gates: str
    shown: tuple[CheckLine, ...]
    checks: tuple[CheckLine, ...]


@dataclass(frozen=True, kw_only=True)
class RowLine:
    """One comparison on the text: every cell with its limit beside it."""

    regime: str
    graph: str
    tokens: str
    perplexity: str
    reference: str
    delta: str
    delta_interval: str
    delta_limit: str
    divergence: str
    divergence_limit: str
    top1: str
    top1_limit: str
    error: str
    error_limit: str
    result: str
    failures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TargetBlock:
    """A target: what it is, its rows, its levels; ``plots`` are SVG made by this package."""

    name: str
    anchor: str
    result: str
    facts: str
    rows: tuple[RowLine, ...]
    levels: tuple[LevelBlock, ...]
    plots: tuple[Any, ...]


def target_block(report: Mapping[str, Any], name: str, anchor: str, plots: Mapping[str, Sequence[Any]]) -> TargetBlock:
    """A target in words.

    Args:
        report: The document.
        name: The target.
        anchor: Its id in the page.
        plots: By target, what :func:`crt_export.report.plots.draw_plots` gave.
    """
    rows = [row for row in report["rows"] if row["target"] == name]
    return TargetBlock(
        name=name,
        anchor=anchor,
        result=target_result(report, name),
        facts=_target_facts(rows),
        rows=tuple(_row_line(row, report["tolerances"]) for row in rows),
        levels=tuple(_level(result) for result in report["levels"] if result["target"] == name),
        plots=tuple(plots.get(name, ())),
    )


def _target_facts(rows: Sequence[Mapping[str, Any]]) -> str:
    """Precision, runtime and arithmetic, each said once."""
    parts = []
    for key in ("precision", "runtime", "arithmetic"):
        values = [str(row[key]) for row in rows if row[key]]
        parts += [", ".join(dict.fromkeys(values))] if values else []
    return " · ".join(dict.fromkeys(parts))


def target_result(report: Mapping[str, Any], target: str) -> str:
    """How a target came out over all its levels and rows."""
    verdicts = [entry["passed"] for entry in (*report["levels"], *report["rows"]) if entry["target"] == target]
    if False in verdicts:
        return FAILED
    return PASSED if True in verdicts else REPORTED


def _level(result: Mapping[str, Any]) -> LevelBlock:
    checks = sorted(result["checks"], key=lambda check: (check["passed"] is not False, -nearness(check)))
    good, gates = held(checks)
    few = len(checks) <= _SHOWN_CHECKS + 2
    failed = [check for check in checks if check["passed"] is False]
    # Claims without figures are not closer to a limit than others: they wait in the table of all checks.
    nearest = [check for check in checks if nearness(check) > 0]
    shown = checks if few else failed[:_SHOWN_FAILURES] or nearest[:_SHOWN_CHECKS]
    if result["level"] == CORPUS and all(check["value"] is None for check in checks):
        shown = checks = []  # the rows say the same with their figures
    return LevelBlock(
        level=result["level"],
        result=outcome(result["passed"]),
        gates=f"{good} of {gates} gates held" if gates else "nothing gated",
        shown=tuple(map(_check_line, shown)),
        checks=() if few else tuple(map(_check_line, result["checks"])),
    )


def _check_line(check: Mapping[str, Any]) -> CheckLine:
    share = check["relation"] == "at least" and (check["limit"] is None or check["limit"] <= 1)
    value, limit, interval = check["value"], check["limit"], check["interval"]
    form = share_text if share and value is not None and value <= 1 else number_text
    sign = {"at most": "≤ ", "at least": "≥ ", "within": "within ±"}[check["relation"]]
    ends = [share_text(end, 2) for end in interval or ()] if form is share_text else []
    return CheckLine(
        name=check["name"],
        figure=check["figure"],
        value=form(value) if value is not None else "",
        interval=f"[{', '.join(ends)}]" if ends else interval_text(interval),
        limit="" if limit is None else sign + form(limit),
        tolerance=check["tolerance"],
        result=outcome(check["passed"]),
        failures=tuple(check["failures"]),
    )


def _row_line(row: Mapping[str, Any], tolerances: Mapping[str, Any]) -> RowLine:
    limits = tolerances.get(row["precision"])
    limits = limits if isinstance(limits, Mapping) else {}
    gap = row["regime"] == "regime-gap"
    excess = row["excess_gap"] is not None
    delta, interval = ("excess_gap", "excess_gap_ci") if excess else ("delta_nll", "delta_nll_ci")
    gated = row["passed"] is not None and (excess or row["better_than_chance"] is True)
    span = f" {row['positions'][0]}–{row['positions'][1]}" if row["positions"] else ""

    def limit(sign: str, key: str, figure: str, form: Any = number_text) -> str:
        return f"{sign} {form(limits[key])}" if row[figure] is not None and limits.get(key) is not None else ""

    return RowLine(
        regime=f"{row['regime']}{span}",
        graph=row["graph"],
        tokens=f", {int(row['tokens']):,} tokens" if row["tokens"] else "",
        perplexity=number_text(row["perplexity"], 5),
        reference=(number_text(row["reference_perplexity"], 5) + " (its steps)" * gap) if row["perplexity"] else "",
        delta=("excess " if excess else "") + number_text(row[delta], 2),
        delta_interval=interval_text(row[interval]),
        delta_limit=limit("±", "gap_delta_nll" if gap else "delta_nll", delta) if gated else "",
        divergence=number_text(row["mean_kl"], 2),
        divergence_limit=limit("≤", "mean_kl", "mean_kl") if gated else "",
        top1=share_text(row["top1_agreement"]),
        top1_limit=limit("≥", "top1_agreement", "top1_agreement", lambda value: share_text(value, 2)),
        error=number_text(row["relative_logit_error"], 2),
        error_limit=limit("≤", "relative_logit_error", "relative_logit_error"),
        result=NOT_RUN if row["status"] != "run" else outcome(row["passed"]),
        failures=tuple(row["failures"]),
    )


def outcome(passed: bool | None) -> str:
    """A verdict as a word."""
    return REPORTED if passed is None else PASSED if passed else FAILED
