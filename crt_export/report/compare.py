"""Compare two reports: what got worse by more than the noise of both.

Gates are matched by level, target and name, rows of the corpus by target, regime, graph and positions. A regression is

* a gate that fails and did not before: it held, only reported or was not there; or one that held and is no longer a
  gate;
* a target, level, check or row that is no longer there, or a figure that is no longer a number;
* a gated figure that is worse by more than the noise. With 95 % intervals the noise is their half widths in quadrature,
  as for independent measurements: the texts are the same, so this rather lets a small change pass than raises a false
  alarm. Without one it is a quarter of the old value. Neither is ever less than a tenth of what the limit leaves room
  for, so that a change from 1e-9 to 3e-9 under a limit of 1e-6 is none.

Figures that gate nothing are listed where they change and never fail. Reports of another model, text or amount of
measurement are refused: their figures differ for reasons that are no regression.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crt_export.errors import InputError
from crt_export.ladder import CORPUS
from crt_export.report.comparable import comparison_problems
from crt_export.report.junit import JUnitCase
from crt_export.report.row_figures import figures_of_row, row_name

REGRESSED = "regressed"
GONE = "gone"
IMPROVED = "improved"
NEW = "new"
WORSE = "worse, not gated"
SAME = "same"

#: Noise of a figure without an interval, and the least noise of any, see the module.
FACTOR_WITHOUT_INTERVAL = 0.25
SHARE_OF_LIMIT = 0.1

Check = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure, gate, level or target in both reports.

    Attributes:
        target: Its target.
        level: Its level.
        name: Check or row, empty where a whole level or target is meant.
        old: Figure of the older report; None where it has none.
        new: Of the newer one.
        noise: By how much it may differ for no reason; None where no figures were compared.
        verdict: ``regressed``, ``gone``, ``improved``, ``new``, ``worse, not gated`` or ``same``.
        reason: What decided it, in words; empty where the figures say it.
    """

    target: str
    level: str
    name: str
    old: float | None = None
    new: float | None = None
    noise: float | None = None
    verdict: str = SAME
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether this is a regression."""
        return self.verdict in (REGRESSED, GONE)

    @property
    def place(self) -> str:
        """Target, level and check."""
        return f"{self.target} {self.level}: {self.name}".removesuffix(": ").strip()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that two reports have in common or not.

    Attributes:
        changes: In the order of the older report, what is new at the end.
        notes: What else differs: versions, machine, limits.
    """

    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What fails the comparison."""
        return tuple(change for change in self.changes if change.failed)

    @property
    def passed(self) -> bool:
        """Whether nothing regressed."""
        return not self.regressions

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "format": "crt-export report comparison",
            "format_version": 1,
            "passed": self.passed,
            "changes": [vars(change).copy() for change in self.changes],
            "notes": list(self.notes),
        }

    def junit_cases(self) -> list[JUnitCase]:
        """One case per figure or gate; what is not gated is skipped."""
        return [
            JUnitCase(
                suite=f"compare {change.target} {change.level}".rstrip(),
                name=change.name or change.level or change.target,
                failures=(change_text(change),) if change.failed else (),
                skipped=change_text(change) if change.verdict == WORSE else None,
            )
            for change in self.changes
        ]


def compare_reports(old: Mapping[str, Any], new: Mapping[str, Any], *, names: tuple[str, str]) -> Comparison:
    """Compare two reports of the same model on the same text.

    Args:
        old: Document of the older report, the baseline.
        new: Of the newer one.
        names: How messages call the two, such as their files.

    Raises:
        InputError: They are not comparable; says in what they differ.
    """
    problems = comparison_problems(old, new)
    if problems:
        raise InputError(
            f"{names[0]} and {names[1]} cannot be compared: {'; '.join(problems)}. Measure the same bundle's model on "
            "the same text with the same options, or make a new baseline"
        )
    changes = list(_changes(old, new))
    return Comparison(changes=tuple(changes), notes=tuple(_notes(old, new)))


def change_text(change: Change) -> str:
    """A change as a sentence."""
    if change.reason:
        return change.reason
    noise = "" if change.noise is None else f", noise {change.noise:.3g}"
    return f"{change.verdict}: {_figure(change.old)} before, {_figure(change.new)} now{noise}"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


# --- matching
def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    before, after = _levels(old), _levels(new)
    targets = dict.fromkeys(entry["target"] for entry in (*old["levels"], *old["rows"]))
    still = {entry["target"] for entry in (*new["levels"], *new["rows"])}
    lost = [target for target in targets if target not in still]
    yield from (Change(target=name, level="", name="", verdict=GONE, reason="the target is gone") for name in lost)
    judged = []
    for (target, level), result in before.items():
        if (target, level) in after:
            judged += list(_check_changes(target, level, result, after[target, level]))
        elif target not in lost:
            yield Change(target=target, level=level, name="", verdict=GONE, reason="the level was not run")
    yield from judged
    for (target, level), result in after.items():
        if (target, level) not in before:
            yield Change(target=target, level=level, name="", verdict=NEW, reason="the level was not run before")
            yield from (_new_check(target, level, check) for check in result.values() if check["passed"] is False)
    # The checks of the corpus repeat figures of its rows: what was judged there is not judged twice.
    seen = {(change.target, change.old, change.new) for change in judged}
    yield from (
        change
        for change in _row_changes(old, new, lost)
        if change.old is None or (change.target, change.old, change.new) not in seen
    )


def _levels(report: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Check]]:
    """Checks by name, by target and level."""
    return {
        (result["target"], result["level"]): {check["name"]: check for check in result["checks"]}
        for result in report["levels"]
    }


def _check_changes(target: str, level: str, old: Mapping[str, Check], new: Mapping[str, Check]) -> Iterator[Change]:
    for name, check in old.items():
        place: dict[str, Any] = {"target": target, "level": level, "name": name}
        if name not in new:
            yield Change(**place, old=check["value"], verdict=GONE, reason="the check is gone")
        else:
            yield Change(**place, **_judged(check, new[name]))
    yield from (_new_check(target, level, check) for name, check in new.items() if name not in old)


def _new_check(target: str, level: str, check: Check) -> Change:
    verdict, reason = NEW, "a new check"
    if check["passed"] is False:
        verdict, reason = REGRESSED, f"a new check, and fails: {'; '.join(check['failures'][:1])}"
    return Change(target=target, level=level, name=check["name"], new=check["value"], verdict=verdict, reason=reason)


def _row_changes(old: Mapping[str, Any], new: Mapping[str, Any], lost: Sequence[str]) -> Iterator[Change]:
    before = {(row["target"], row_name(row)): row for row in old["rows"] if row["target"] not in lost}
    after = {(row["target"], row_name(row)): row for row in new["rows"]}
    for (target, name), row in before.items():
        found = after.get((target, name))
        if found is None:
            yield Change(target=target, level=CORPUS, name=name, verdict=GONE, reason="the comparison is gone")
            continue
        figures = figures_of_row(found, new["tolerances"])
        for figure, check in figures_of_row(row, old["tolerances"]).items():
            yield Change(target=target, level=CORPUS, name=f"{name}: {figure}", **_judged(check, figures[figure]))


# --- judging
def _judged(old: Check, new: Check) -> dict[str, Any]:
    """Old and new figure, noise, verdict and reason of one check."""
    figures = {"old": old["value"], "new": new["value"]}
    if new["passed"] is False and old["passed"] is not False:
        before = "held" if old["passed"] else "was only reported"
        return {**figures, "verdict": REGRESSED, "reason": f"{before}, and fails: {'; '.join(new['failures'][:1])}"}
    if old["passed"] is True and new["passed"] is None:
        return {**figures, "verdict": REGRESSED, "reason": "was a gate, and is only reported"}
    if old["passed"] is False and new["passed"] is True:
        return {**figures, "verdict": IMPROVED, "reason": "failed, and holds"}
    if old["value"] is None:
        return figures
    if new["value"] is None:
        return {**figures, "verdict": REGRESSED, "reason": f"was {_figure(old['value'])}, and is no number"}
    noise = _noise(old, new)
    worse = _badness(new) - _badness(old)
    verdict = SAME
    if worse > noise:
        verdict = WORSE if new["passed"] is None else REGRESSED
    elif worse < -noise:
        verdict = IMPROVED
    return {**figures, "noise": noise, "verdict": verdict}


def _badness(check: Check) -> float:
    """The figure so that more is worse."""
    value = check["value"]
    return {"at most": value, "at least": -value, "within": abs(value)}[check["relation"]]


def _noise(old: Check, new: Check) -> float:
    halves = [_half_width(check["interval"]) for check in (old, new)]
    known = [half for half in halves if half is not None]
    if known:
        # An interval that one report lacks is taken to be as wide as the other's.
        noise = math.hypot(*(known if len(known) == 2 else known * 2))
    else:
        share = old["relation"] == "at least" and 0 <= old["value"] <= 1
        noise = FACTOR_WITHOUT_INTERVAL * abs(1 - old["value"] if share else old["value"])
    rooms = [_room(check) for check in (old, new) if check["limit"] is not None]
    return max(noise, SHARE_OF_LIMIT * min(rooms, default=0.0))


def _half_width(interval: Sequence[float | None] | None) -> float | None:
    if interval is None or interval[0] is None or interval[1] is None:
        return None
    return (interval[1] - interval[0]) / 2


def _room(check: Check) -> float:
    """What a limit leaves room for: of a share that must be at least 0.98, the 0.02."""
    limit = abs(check["limit"])
    return 1 - limit if check["relation"] == "at least" and limit < 1 else limit


# --- what else differs
def _notes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("versions", "environment"):
        for key in dict.fromkeys((*old[kind], *new[kind])):
            if old[kind].get(key) != new[kind].get(key):
                yield f"{key}: {old[kind].get(key, 'none')} before, {new[kind].get(key, 'none')} now"
    before, after = _limits(old["tolerances"]), _limits(new["tolerances"])
    for key in dict.fromkeys((*before, *after)):
        if before.get(key) != after.get(key):
            yield f"limit {key}: {_figure(before.get(key))} before, {_figure(after.get(key))} now"


def _limits(tolerances: Mapping[str, Any]) -> dict[str, float | None]:
    limits = {}
    for name, value in tolerances.items():
        entries = value.items() if isinstance(value, Mapping) else [("", value)]
        limits |= {f"{name}.{key}".rstrip("."): limit for key, limit in entries}
    return limits
