"""Ladder of a spoiled bundle, as ``crt-export validate`` takes it, until a level fails; the answers as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fault_bundle import SpoiledBundle
from faults_of_graphs import Fault

from crt_export.environment import installed_versions
from crt_export.errors import CrtExportError
from crt_export.machine import machine
from crt_export.parity import ParityOptions, validate_bundle
from crt_export.parity.levels import CHAIN, CONTRACT, CORPUS, FREE_RUNNING, ONE_STEP
from crt_export.parity.metrics import Check
from crt_export.selftest import run_selftest

#: The levels of the gate that take less than a minute. Before them stands ``opening``: a bundle or text is refused;
#: after them ``selftest``, the replay of the vectors where the bundle is deployed.
FAST_LEVELS = (CONTRACT, ONE_STEP, CHAIN, CORPUS, FREE_RUNNING)
OPENING = "opening"
SELFTEST = "selftest"
COMMAND = "python -m pytest validate/parity/test_fault_evidence.py"
_HEADING = ("fault", "caught by", "figure", "what it says", "also failed")
_LONGEST = 180

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Catch:
    """What the gate said about one fault.

    Attributes:
        fault: Its name.
        target: The target that it was written into.
        level: The lowest level that failed; None where every level passed.
        figure: What was measured and its limit; empty where the failure is a statement.
        sentence: What the level said: of its failures the first that names the place, else the first.
        named: Whether the sentence names the place.
        also: The levels above that failed too, if they were asked.
    """

    fault: str
    target: str
    level: str | None
    figure: str = ""
    sentence: str = ""
    named: bool = False
    also: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "also": list(self.also)}


def catch(
    fault: Fault,
    bundle: SpoiledBundle,
    options: dict[str, Any],
    *,
    text: Path | None = None,
    tokens: Path | None = None,
    everything: bool = False,
) -> Catch:
    """Write a fault into a bundle, sign it, and ask level by level.

    Args:
        fault: What to write.
        bundle: A copy of a bundle.
        options: Of :class:`ParityOptions`, without the levels.
        text: What to validate on; ``tokens`` instead of it is a .npy file of ids.
        tokens: See ``text``.
        everything: Ask the levels above the first that failed too.
    """
    fault.inject(bundle)
    bundle.sign()
    caught: list[Catch] = []
    for level in (*FAST_LEVELS, SELFTEST):
        found = _ask(level, fault, bundle, options, text, tokens)
        if found is not None:
            caught.append(found)
            if found.level == OPENING or not everything:
                break
    if not caught:
        return Catch(fault=fault.name, target=bundle.target, level=None)
    return replace(caught[0], also=tuple(str(later.level) for later in caught[1:]))


def _ask(
    level: str, fault: Fault, bundle: SpoiledBundle, options: dict[str, Any], text: Path | None, tokens: Path | None
) -> Catch | None:
    """What one level says; None where it finds nothing."""
    try:
        if level == SELFTEST:
            return _caught(fault, bundle, level, [(None, line) for line in run_selftest(bundle.path).failures])
        chosen = ParityOptions(levels=(level,), **options)
        report = validate_bundle(bundle.path, text=text, tokens=tokens, options=chosen)
    except CrtExportError as error:
        refused = SELFTEST if level == SELFTEST else OPENING
        found = _caught(fault, bundle, refused, [(None, str(error))])
        return found and replace(found, figure=f"exit code {error.exit_code}")
    failed = [result for result in report.levels if result.passed is False]
    return _caught(
        fault,
        bundle,
        # The text is judged before anything is, whichever level was asked.
        failed[0].level if failed else level,
        [
            (check, f"{check.name}: {sentence}")
            for result in failed
            for check in result.checks
            for sentence in check.failures
        ],
    )


def _caught(
    fault: Fault, bundle: SpoiledBundle, level: str, failed: Sequence[tuple[Check | None, str]]
) -> Catch | None:
    """The failure that names the place, else the first; None where there is none."""
    if not failed:
        return None
    named = [pair for pair in failed if all(re.search(pattern, pair[1]) for pattern in fault.says)]
    check, sentence = (named or failed)[0]
    for path in (bundle.path, bundle.path.parent):  # where a test keeps its copy is nothing to tell
        sentence = sentence.replace(f"{path}/", "").replace(str(path), path.name)
    figure = "" if check is None else _figure(check)
    return Catch(
        fault=fault.name, target=bundle.target, level=level, figure=figure, sentence=sentence, named=bool(named)
    )


def _figure(check: Check) -> str:
    if check.limit is None or (check.value is None and check.interval is None):
        return ""
    found = f"{check.value:.3g}" if check.interval is None else f"[{check.interval[0]:.3g}, {check.interval[1]:.3g}]"
    return f"{found}, {check.relation} {check.limit:g}"


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """One line per fault: target, level, name."""
    return [f"{row['bundle']:<12} {row['target']:<14} {row['level'] or 'NOTHING':<12} {row['fault']}" for row in rows]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write the table as a page in Markdown."""
    environment = {
        **machine(),
        **installed_versions(("torch", "onnx", "onnxruntime", "numpy")),
        "date": datetime.now(UTC).date().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
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
