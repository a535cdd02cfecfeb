"""A report as what the HTML template shows: words and formatted figures, no markup."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crt_export.catalog import definition_path
from crt_export.ladder import CERTIFICATE, FREE_RUNNING, LONG_RUN
from crt_export.report.gates import Failure, Verdict, failures_of, held, levels_of, targets_of, verdict_of
from crt_export.report.numbers import MISSING, number_text, share_text
from crt_export.report.target_block import FAILED, TargetBlock, outcome, target_block, target_result

_SHOWN_FAILURES = 10


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
        targets=tuple(target_block(report, name, f"target-{n}", plots) for n, name in enumerate(targets, start=1)),
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
        result = outcome(results[level]["passed"])
        cells.append((result, f"{good} of {gates}" if result == FAILED else str(gates) if gates else ""))
    return target, f"target-{number}", target_result(report, target), tuple(cells)


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
        "growth per 1,000, chained",
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
    """Of the chained run, whose positions all lie below the training length; the single run's stands in the level."""
    runs = data.get(LONG_RUN, {}).get("runs") or []
    rates = [(run.get("growth") or {}).get("per_1000_tokens") for run in runs if run.get("kind") == "chained"]
    return number_text(rates[0], 2) if rates and rates[0] is not None else MISSING


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
