"""A report as what the HTML template shows: words and formatted figures, no markup."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crt_export.catalog import definition_path
from crt_export.ladder import CERTIFICATE, CONTRACT, CORPUS, FREE_RUNNING, LONG_RUN
from crt_export.report.gates import Failure, Verdict, failures_of, held, levels_of, targets_of, verdict_of
from crt_export.report.nearness import nearness
from crt_export.report.numbers import MISSING, interval_text, number_text, share_text

_PASSED, _FAILED, _REPORTED, _COMPILED = "passed", "failed", "reported", "not run"
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


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything that the template shows."""

    verdict: Verdict
    failures: tuple[Failure, ...]
    hidden_failures: int
    levels: tuple[str, ...]
    matrix: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...]
    key_columns: tuple[str, ...]
    key_rows: tuple[tuple[str, tuple[str, ...]], ...]
    targets: tuple[TargetBlock, ...]
    facts: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    limits: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    method: str
    command: str
    created: str
    subtitle: str


def page_from_report(report: Mapping[str, Any], plots: Mapping[str, Sequence[Any]]) -> Page:
    """Put a report into words.

    Args:
        report: The document.
        plots: By target, what :func:`crt_export.report.plots.draw_plots` gave.
    """
    failures = failures_of(report)
    targets = targets_of(report)
    levels = levels_of(report)
    key_columns, key_rows = _key_figures(report, targets)
    return Page(
        verdict=verdict_of(report),
        failures=tuple(failures[:_SHOWN_FAILURES]),
        hidden_failures=max(0, len(failures) - _SHOWN_FAILURES),
        levels=tuple(levels),
        matrix=tuple(_matrix_row(report, name, number, levels) for number, name in enumerate(targets, start=1)),
        key_columns=key_columns,
        key_rows=key_rows,
        targets=tuple(_target(report, name, f"target-{n}", plots) for n, name in enumerate(targets, start=1)),
        facts=_facts(report),
        limits=_limits(report["tolerances"]),
        notes=tuple(report["notes"]),
        method=report["method"],
        command=report["command"],
        created=report["created"].replace("T", " ").replace("+00:00", " UTC"),
        subtitle=_subtitle(report),
    )


def _subtitle(report: Mapping[str, Any]) -> str:
    model, text = report["model"], report["text"]
    kind = str(model.get("config", {}).get("model_type", "model")).replace("_", " ")
    size = f" of {model['parameters']:,} parameters" if "parameters" in model else ""
    scored = text["windows"] * text["window"]
    return f"A {kind}{size} against PyTorch FP32, on {scored:,} tokens of held-out text in {text['windows']:,} windows"


# --- overview
def _matrix_row(
    report: Mapping[str, Any], target: str, number: int, levels: Sequence[str]
) -> tuple[str, str, str, tuple[tuple[str, str], ...]]:
    """Name, anchor, result, and per level how it came out with the count of its gates."""
    results = {result["level"]: result for result in report["levels"] if result["target"] == target}
    cells = []
    for level in levels:
        if level not in results:
            cells.append(("", MISSING))
            continue
        good, gates = held(results[level]["checks"])
        outcome = _outcome(results[level]["passed"])
        cells.append((outcome, f"{good} of {gates}" if outcome == _FAILED else str(gates) if gates else ""))
    return target, f"target-{number}", _target_result(report, target), tuple(cells)


def _key_figures(
    report: Mapping[str, Any], targets: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """The figures that are asked for first, target by target; columns that no target has are left out."""
    columns = (
        "perplexity",
        "Δ NLL, nats",
        "mean KL, nats",
        "top-1",
        "agreement, tokens",
        "smallest K",
        "growth per 1,000",
    )
    rows = []
    for target in targets:
        data = {result["level"]: result["data"] for result in report["levels"] if result["target"] == target}
        step = next((r for r in report["rows"] if r["target"] == target and r["regime"] == "step" and r["nll"]), None)
        cells = [MISSING] * 4
        if step is not None:
            cells = [
                number_text(step["perplexity"], 5),
                number_text(step["delta_nll"], 2),
                number_text(step["mean_kl"], 2),
                share_text(step["top1_agreement"], 2),
            ]
        free = data.get(FREE_RUNNING, {})
        agreement = (
            f"{number_text(free.get('agreement_mean'))} of {free.get('new_tokens')}"
            if free.get("new_tokens")
            else MISSING
        )
        rows.append((target, (*cells, agreement, _smallest_passes(data), _growth(data))))
    used = [index for index in range(len(columns)) if any(cells[index] != MISSING for _, cells in rows)]
    kept = tuple((name, tuple(cells[index] for index in used)) for name, cells in rows)
    return tuple(columns[index] for index in used), tuple(row for row in kept if set(row[1]) != {MISSING})


def _smallest_passes(data: Mapping[str, Any]) -> str:
    """Per span, below and above the training length."""
    spans = data.get(CERTIFICATE, {}).get("spans") or []
    words = [f"{span.get('smallest_passes') or 'none'} ({span.get('start')}–{span.get('stop')})" for span in spans]
    return ", ".join(words) or MISSING


def _growth(data: Mapping[str, Any]) -> str:
    rates = [(run.get("growth") or {}).get("per_1000_tokens") for run in data.get(LONG_RUN, {}).get("runs") or []]
    known = [rate for rate in rates if rate is not None]
    return number_text(max(known), 2) if known else MISSING


# --- one target
def _target(report: Mapping[str, Any], name: str, anchor: str, plots: Mapping[str, Sequence[Any]]) -> TargetBlock:
    rows = [row for row in report["rows"] if row["target"] == name]
    return TargetBlock(
        name=name,
        anchor=anchor,
        result=_target_result(report, name),
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


def _target_result(report: Mapping[str, Any], target: str) -> str:
    verdicts = [entry["passed"] for entry in (*report["levels"], *report["rows"]) if entry["target"] == target]
    if False in verdicts:
        return _FAILED
    return _PASSED if True in verdicts else _REPORTED


def _level(result: Mapping[str, Any]) -> LevelBlock:
    checks = sorted(result["checks"], key=lambda check: (check["passed"] is not False, -nearness(check)))
    good, gates = held(checks)
    few = len(checks) <= _SHOWN_CHECKS + 2
    shown = checks if few else [c for c in checks if c["passed"] is False][:_SHOWN_FAILURES] or checks[:_SHOWN_CHECKS]
    if result["level"] == CONTRACT and not few and result["passed"]:
        shown = []  # claims without figures: none is nearer to its limit than another
    if result["level"] == CORPUS and all(check["value"] is None for check in checks):
        shown = checks = []  # the rows say the same with their figures
    return LevelBlock(
        level=result["level"],
        result=_outcome(result["passed"]),
        gates=f"{good} of {gates} gates held" if gates else "nothing gated",
        shown=tuple(map(_check_line, shown)),
        checks=() if few else tuple(map(_check_line, result["checks"])),
    )


def _check_line(check: Mapping[str, Any]) -> CheckLine:
    share = check["relation"] == "at least" and (check["limit"] is None or check["limit"] <= 1)
    value, limit, interval = check["value"], check["limit"], check["interval"]
    form = share_text if share and value is not None and value <= 1 else number_text
    sign = {"at most": "≤ ", "at least": "≥ ", "within": "within ±"}[check["relation"]]
    shares = interval is not None and form is share_text
    return CheckLine(
        name=check["name"],
        figure=check["figure"],
        value=form(value) if value is not None else "",
        interval="[" + ", ".join(share_text(end, 2) for end in interval) + "]" if shares else interval_text(interval),
        limit="" if limit is None else sign + form(limit),
        tolerance=check["tolerance"],
        result=_outcome(check["passed"]),
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
        divergence_limit=limit("≤", "mean_kl", "mean_kl"),
        top1=share_text(row["top1_agreement"]),
        top1_limit=limit("≥", "top1_agreement", "top1_agreement", lambda value: share_text(value, 2)),
        error=number_text(row["relative_logit_error"], 2),
        error_limit=limit("≤", "relative_logit_error", "relative_logit_error"),
        result=_COMPILED if row["status"] != "run" else _outcome(row["passed"]),
        failures=tuple(row["failures"]),
    )


def _outcome(passed: bool | None) -> str:
    return _REPORTED if passed is None else _PASSED if passed else _FAILED


# --- what it stands on
def _facts(report: Mapping[str, Any]) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    model, text = report["model"], report["text"]
    shape = {
        key: value for key, value in (model.get("config") or {}).items() if isinstance(value, str | int | float | bool)
    }
    return (
        ("Model", (*_named({key: model.get(key) for key in ("checkpoint", "parameters")}), *_named(shape))),
        ("Text", _named(text)),
        ("Machine", _named(report["environment"])),
        ("Versions", _named(report["versions"])),
    )  # fmt: skip


def _named(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    def shown(value: Any) -> str:
        return f"{value:,}" if type(value) is int else str(value)

    return tuple((key.replace("_", " "), shown(value)) for key, value in values.items() if value is not None)


def _limits(tolerances: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Name, limit and reason; the reason stands only where this installation has the very same limit."""
    known = tomllib.loads(definition_path("validate", "tolerances.toml").read_text(encoding="utf-8"))
    lines = []
    for name, value in tolerances.items():
        table, entries = (name, value) if isinstance(value, Mapping) else ("shared", {name: value})
        for key, limit in entries.items():
            if limit is None:
                continue
            entry = known.get(table, {}).get(key, {})
            same = entry.get("limit") == limit
            reason = entry.get("reason", "") if same else "Not the limit of the crt-export that rendered this page."
            lines.append((f"{table}.{key}", number_text(limit, 6), reason))
    return tuple(lines)
