"""What the gate said about every fault, for the end of a test run and as a table with its circumstances."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crt_export.environment import installed_versions
from crt_export.machine import machine

COMMAND = "python -m pytest validate/parity/test_fault_evidence.py"
_HEADING = ("fault", "caught by", "figure", "what it says", "also failed")
_LONGEST = 180

Row = Mapping[str, Any]


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """One line per fault: target, level, name."""
    return [f"{row['bundle']:<12} {row['target']:<14} {row['level'] or 'NOTHING':<12} {row['fault']}" for row in rows]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write the table as Markdown, and as JSON beside it."""
    environment = {
        **machine(),
        **installed_versions(("torch", "onnx", "onnxruntime", "numpy")),
        "date": datetime.now(UTC).date().isoformat(),
    }
    document = {"command": COMMAND, "environment": environment, "faults": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    path.write_text(_markdown(rows, environment, path), encoding="utf-8")


def _markdown(rows: Sequence[Row], environment: Mapping[str, Any], path: Path) -> str:
    caught = sum(row["level"] is not None for row in rows)
    lines = [
        "# Faults that the gate was given",
        "",
        f"{len({row['fault'] for row in rows})} kinds of fault, injected {len(rows)} times, caught {caught} times.",
        "Each was written into the ONNX files of a built bundle or into a file beside them, and the bundle was",
        "signed again; then it went up the ladder as in `crt-export validate`, on short windows, and",
        "`crt-export selftest` came last. *Caught by*: the lowest level that failed; *also failed*: those above it,",
        "where they were asked. `opening` is a bundle or a text that is refused before any level. The tests assert",
        "level and place.",
        "",
        "```console",
        f"$ {COMMAND} --fault-table {path.parent.parent.name}/{path.parent.name}/{path.name}",
        "```",
        "",
        ", ".join(f"{name} {value}" for name, value in environment.items()),
    ]
    groups = dict.fromkeys((row["bundle"], row["target"]) for row in rows)
    for bundle, target in groups:
        lines += ["", f"## {bundle}, {target}", "", _line(_HEADING), _line(["---"] * len(_HEADING))]
        lines += [_line(_cells(row)) for row in rows if (row["bundle"], row["target"]) == (bundle, target)]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    sentence = " ".join(row["sentence"].split())
    short = sentence if len(sentence) <= _LONGEST else f"{sentence[: _LONGEST - 1]}…"
    return [row["fault"], row["level"] or "**nothing**", row["figure"] or "–", short, ", ".join(row["also"]) or "–"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
