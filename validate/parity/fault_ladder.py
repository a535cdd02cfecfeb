"""Take a spoiled bundle up the ladder as ``crt-export validate`` does, until a level fails."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fault_bundle import SpoiledBundle
from faults import Fault

from crt_export.errors import CrtExportError
from crt_export.ladder import CHAIN, CONTRACT, CORPUS, FREE_RUNNING, ONE_STEP
from crt_export.parity import ParityOptions, ParityReport, validate_bundle
from crt_export.parity.level import Check

#: The levels of the gate that take less than a minute; ``opening`` stands for a bundle that is refused before them.
FAST_LEVELS = (CONTRACT, ONE_STEP, CHAIN, CORPUS, FREE_RUNNING)
OPENING = "opening"


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
    first: Catch | None = None
    also: list[str] = []
    for level in FAST_LEVELS:
        chosen = ParityOptions(levels=(level,), **options)
        try:
            report = validate_bundle(bundle.path, text=text, tokens=tokens, options=chosen)
        except CrtExportError as error:
            sentence = str(error)
            return Catch(
                fault=fault.name,
                target=bundle.target,
                level=OPENING,
                figure=f"exit code {error.exit_code}",
                sentence=sentence,
                named=_names(sentence, fault.says),
            )
        if report.passed:
            continue
        if first is not None:
            also.append(level)
            continue
        first = _caught(fault, bundle.target, level, report)
        if not everything:
            return first
    if first is None:
        return Catch(fault=fault.name, target=bundle.target, level=None)
    return Catch(**{**asdict(first), "also": tuple(also)})


def markdown_table(catches: Sequence[Catch]) -> str:
    """One row per fault, targets one after the other."""
    heading = ("fault", "target", "caught by", "figure", "what it says", "also failed")
    rows = [
        (c.fault, c.target, c.level or "**nothing**", c.figure or "–", _short(c.sentence), ", ".join(c.also) or "–")
        for c in catches
    ]
    lines = [heading, ("---",) * len(heading), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _caught(fault: Fault, target: str, level: str, report: ParityReport) -> Catch:
    failed = [
        (check, f"{check.name}: {sentence}")
        for result in report.levels
        if result.level == level
        for check in result.checks
        for sentence in check.failures
    ]
    named = [pair for pair in failed if _names(pair[1], fault.says)]
    check, sentence = (named or failed)[0]
    return Catch(
        fault=fault.name,
        target=target,
        level=level,
        figure=_figure(check),
        sentence=sentence,
        named=bool(named),
    )


def _figure(check: Check) -> str:
    if check.limit is None or (check.value is None and check.interval is None):
        return ""
    found = f"{check.value:.3g}" if check.interval is None else f"[{check.interval[0]:.3g}, {check.interval[1]:.3g}]"
    return f"{found}, {check.relation} {check.limit:g}"


def _names(sentence: str, says: Sequence[str]) -> bool:
    return all(re.search(pattern, sentence) for pattern in says)


def _short(sentence: str, most: int = 200) -> str:
    line = " ".join(sentence.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
