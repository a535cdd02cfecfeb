"""A report as what the HTML template shows: words and formatted figures, no markup."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crt_export.catalog import definition_path
from crt_export.parity.levels import CERTIFICATE, CORPUS, FREE_RUNNING, LONG_RUN
from crt_export.parity.metrics import AT_LEAST, AT_MOST, METRICS, WITHIN, Check, Metric
from crt_export.parity.report import GAP, RUN, Comparison, LevelResult, ParityReport, held
from crt_export.report.numbers import MISSING, interval_text, named_values, number_text, share_text, time_text
from crt_export.report.verdict import (
    FAILED,
    NOT_RUN,
    Failure,
    Verdict,
    failures_of,
    gates_held,
    levels_of,
    outcome,
    target_checks,
    verdict_of,
)

_SHOWN_FAILURES = 10
#: Checks that a level shows before the table of all of them.
_SHOWN_CHECKS = 5
_SHOWN_FAILED_CHECKS = 20
#: Columns of the table of regimes: the first of these metrics that the regime has.
_COLUMNS = (("gap_delta_nll", "delta_nll"), ("mean_kl",), ("top1_agreement",), ("relative_logit_error",))
_SIGNS = {AT_MOST: "≤ ", AT_LEAST: "≥ ", WITHIN: "within ±"}


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
class RegimeLine:
    """One regime on the text: what ran, its perplexity, and per column value, interval and limit."""

    regime: str
    graph: str
    tokens: str
    perplexity: str
    reference: str
    figures: tuple[tuple[str, str, str, str], ...]
    result: str
    failures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TargetBlock:
    """A target: what it is, its regimes, its levels; ``plots`` are SVG made by this package."""

    name: str
    anchor: str
    result: str
    facts: str
    rows: tuple[RegimeLine, ...]
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
    columns: tuple[str, ...]
    targets: tuple[TargetBlock, ...]
    facts: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    limits: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    method: str
    command: str
    created: str
    bundle: str
    model: str
    subtitle: str


def page_from_report(report: ParityReport, plots: Mapping[str, Sequence[Any]], *, bundle: str = "") -> Page:
    """Put a report into words.

    Args:
        report: The report.
        plots: By target, what :func:`crt_export.report.plots.draw_plots` gave.
        bundle: Name of the bundle; empty where it is not known.
    """
    failures = failures_of(report)
    levels = levels_of(report)
    key_columns, key_rows = _key_figures(report)
    targets = list(enumerate(report.targets, start=1))
    return Page(
        verdict=verdict_of(report),
        failures=tuple(failures[:_SHOWN_FAILURES]),
        hidden_failures=max(0, len(failures) - _SHOWN_FAILURES),
        levels=tuple(levels),
        matrix=tuple(_matrix_row(report, name, number, levels) for number, name in targets),
        key_columns=key_columns,
        key_rows=key_rows,
        columns=("Perplexity", *(METRICS[keys[-1]].title for keys in _COLUMNS)),
        targets=tuple(target_block(report, name, f"target-{number}", plots.get(name, ())) for number, name in targets),
        facts=_facts(report),
        limits=_limits(report.tolerances),
        notes=tuple(report.notes),
        method=report.method,
        command=report.command,
        created=time_text(report.created),
        bundle=bundle,
        model=_model(report.model),
        subtitle=_subtitle(report.text),
    )


def _model(model: Mapping[str, Any]) -> str:
    kind = str((model.get("config") or {}).get("model_type", "model")).replace("_", " ")
    size = f" of {model['parameters']:,} parameters" if "parameters" in model else ""
    checkpoint = f", checkpoint {str(model['checkpoint'])[:12]}" if model.get("checkpoint") else ""
    return f"{kind}{size}{checkpoint}"


def _subtitle(text: Mapping[str, Any]) -> str:
    scored = text["windows"] * text["window"]
    return f"Against PyTorch FP32, on {scored:,} tokens of held-out text in {text['windows']:,} windows"


# --- overview
def _matrix_row(
    report: ParityReport, target: str, number: int, levels: Sequence[str]
) -> tuple[str, str, str, tuple[tuple[str, str], ...]]:
    """Name, anchor, result, and per level how it came out with the count of its gates."""
    cells = []
    for level in levels:
        result = report.result(target, level)
        if result is None:
            cells.append(("", MISSING))
            continue
        good, gates = gates_held(result.checks)
        word = outcome(result.passed)
        cells.append((word, f"{good} of {gates}" if word == FAILED else str(gates) if gates else ""))
    return target, f"target-{number}", outcome(held(target_checks(report, target))), tuple(cells)


def _key_figures(report: ParityReport) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """The figures that are asked for first, target by target; columns that no target has are left out."""
    shown = ("delta_nll", "mean_kl", "top1_agreement")
    columns = ("Perplexity", *(METRICS[key].title for key in shown), "Agreement, tokens", "Smallest K",
               "Growth per 1,000, chained")  # fmt: skip
    rows = []
    for target in report.targets:
        data = {result.level: result.data for result in report.levels if result.target == target}
        step = next((row for row in report.rows if row.target == target and row.regime == "step" and row.nll), None)
        cells = [MISSING] * (1 + len(shown))
        if step is not None:
            cells = [number_text(step.perplexity, 5), *(metric_text(METRICS[key], step.value(key)) for key in shown)]
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


def metric_text(metric: Metric, value: float | None) -> str:
    """A figure as its metric is shown."""
    return share_text(value, 2) if metric.share else number_text(value, 2)


def _smallest_passes(data: Mapping[str, Any]) -> str:
    """Per range of positions, below and above the training length."""
    spans = data.get(CERTIFICATE, {}).get("spans") or []
    words = [f"{span.get('smallest_passes') or 'none'} ({span.get('start')}–{span.get('stop')})" for span in spans]
    return ", ".join(words) or MISSING


def _growth(data: Mapping[str, Any]) -> str:
    """Of the chained run, whose positions all lie below the training length; the single run's stands in the level."""
    runs = data.get(LONG_RUN, {}).get("runs") or []
    rates = [(run.get("growth") or {}).get("per_1000_tokens") for run in runs if run.get("kind") == "chained"]
    return number_text(rates[0], 2) if rates and rates[0] is not None else MISSING


# --- a target
def target_block(report: ParityReport, name: str, anchor: str, plots: Sequence[Any]) -> TargetBlock:
    """A target in words.

    Args:
        report: The report.
        name: The target.
        anchor: Its id in the page.
        plots: What :func:`crt_export.report.plots.draw_plots` gave for it.
    """
    rows = [row for row in report.rows if row.target == name]
    return TargetBlock(
        name=name,
        anchor=anchor,
        result=outcome(held(target_checks(report, name))),
        facts=_target_facts(rows),
        rows=tuple(map(_regime_line, rows)),
        levels=tuple(_level(result) for result in report.levels if result.target == name),
        plots=tuple(plots),
    )


def _target_facts(rows: Sequence[Comparison]) -> str:
    """Precision, runtime and arithmetic, each said once."""
    parts = []
    for values in (
        [row.precision for row in rows],
        [row.runtime for row in rows],
        [row.arithmetic for row in rows if row.arithmetic],
    ):
        parts += [", ".join(dict.fromkeys(values))] if values else []
    return " · ".join(dict.fromkeys(parts))


def _level(result: LevelResult) -> LevelBlock:
    checks = sorted(result.checks, key=lambda check: (check.passed is not False, -check.limit_usage))
    good, gates = gates_held(checks)
    few = len(checks) <= _SHOWN_CHECKS + 2
    failed = [check for check in checks if check.passed is False]
    # Claims without figures are not closer to a limit than others: they wait in the table of all checks.
    nearest = [check for check in checks if check.limit_usage > 0]
    shown = checks if few else failed[:_SHOWN_FAILED_CHECKS] or nearest[:_SHOWN_CHECKS]
    if result.level == CORPUS and all(check.value is None for check in checks):
        shown = checks = []  # the regimes say the same with their figures
    return LevelBlock(
        level=result.level,
        result=outcome(result.passed),
        gates=f"{good} of {gates} gates held" if gates else "nothing gated",
        shown=tuple(map(_check_line, shown)),
        checks=() if few else tuple(map(_check_line, result.checks)),
    )


def _check_line(check: Check) -> CheckLine:
    share = check.relation == AT_LEAST and (check.limit is None or check.limit <= 1) and (check.value or 0) <= 1
    form = share_text if share else number_text
    ends = [share_text(end, 2) for end in check.interval or ()] if share else []
    return CheckLine(
        name=check.name,
        figure=check.figure,
        value=form(check.value) if check.value is not None else "",
        interval=f"[{', '.join(ends)}]" if ends else interval_text(check.interval),
        limit="" if check.limit is None else _SIGNS[check.relation] + form(check.limit),
        tolerance=check.tolerance,
        result=outcome(check.passed),
        failures=check.failures,
    )


def _regime_line(row: Comparison) -> RegimeLine:
    range_text = f" {row.positions[0]}–{row.positions[1]}" if row.positions else ""
    reference = number_text(row.reference_perplexity, 5) + " (its steps)" * (row.regime == GAP)
    return RegimeLine(
        regime=f"{row.regime}{range_text}",
        graph=row.graph,
        tokens=f", {int(row.tokens):,} tokens" if row.tokens else "",
        perplexity=number_text(row.perplexity, 5),
        reference=reference if row.perplexity else "",
        figures=tuple(_figure(row, keys) for keys in _COLUMNS),
        result=NOT_RUN if row.status != RUN else outcome(row.passed),
        failures=row.failures,
    )


def _figure(row: Comparison, keys: Sequence[str]) -> tuple[str, str, str, str]:
    """Title, value, interval and limit of the first of these metrics that a regime has."""
    title = METRICS[keys[-1]].title
    check = next((check for check in map(row.check, keys) if check is not None), None)
    if check is None:
        return title, MISSING, "", ""
    metric = METRICS[check.metric]
    limit = "" if check.limit is None else f"{_SIGNS[check.relation].strip()} {metric_text(metric, check.limit)}"
    interval = "" if metric.share else interval_text(check.interval)
    value = share_text(check.value) if metric.share else number_text(check.value, 2)
    return title, "excess " * (check.metric == "gap_delta_nll") + value, interval, limit.replace("within ± ", "± ")


# --- what it stands on
def _facts(report: ParityReport) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    model = report.model
    shape = {
        key: value for key, value in (model.get("config") or {}).items() if isinstance(value, str | int | float | bool)
    }
    return (
        ("Model", (*named_values({key: model.get(key) for key in ("checkpoint", "parameters")}), *named_values(shape))),
        ("Text", named_values(report.text)),
        ("Machine", named_values(report.environment)),
        ("Versions", named_values(report.versions)),
    )


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
