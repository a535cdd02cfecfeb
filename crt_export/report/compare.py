"""Compare two reports: what got worse by more than the noise of both.

Gates are matched by level, target and name. A regression is

* a gate that fails and did not before: it held, only reported or was not there; or one that held and is no longer a
  gate;
* a target, level, regime or check that is no longer there, or a figure that is no longer a number;
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
from crt_export.parity.levels import CERTIFICATE, CHAIN, FREE_RUNNING, LONG_RUN, ONE_STEP
from crt_export.parity.metrics import AT_LEAST, AT_MOST, WITHIN, Check
from crt_export.parity.report import GAP, LevelResult, ParityReport
from crt_export.report.junit import JUnitCase

REGRESSED = "regressed"
GONE = "gone"
IMPROVED = "improved"
NEW = "new"
WORSE = "worse, not gated"
SAME = "same"

#: Noise of a figure without an interval, and the least noise of any, see the module.
FACTOR_WITHOUT_INTERVAL = 0.25
SHARE_OF_LIMIT = 0.1
#: PyTorch FP32 on another processor or of another version rounds otherwise; nothing else moves its perplexity.
_REFERENCE_NOISE = 1e-4
_TEXT = ("sha256", "tokens", "windows", "window")
#: What says how much a level measured.
_AMOUNTS = {
    ONE_STEP: ("positions",),
    CHAIN: ("windows", "steps"),
    FREE_RUNNING: ("prompts", "prompt_tokens", "new_tokens"),
    CERTIFICATE: ("unroll", "window", "windows"),
}


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


def compare_reports(old: ParityReport, new: ParityReport, *, names: tuple[str, str]) -> Comparison:
    """Compare two reports of the same model on the same text.

    Args:
        old: The older report, the baseline.
        new: The newer one.
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
def _changes(old: ParityReport, new: ParityReport) -> Iterator[Change]:
    before, after = ({(result.target, result.level): result for result in report.levels} for report in (old, new))
    lost = [target for target in dict.fromkeys(result.target for result in old.levels) if target not in new.targets]
    yield from (Change(target=name, level="", name="", verdict=GONE, reason="the target is gone") for name in lost)
    for (target, level), result in before.items():
        if (target, level) in after:
            yield from _check_changes(result, after[target, level])
        elif target not in lost:
            yield Change(target=target, level=level, name="", verdict=GONE, reason="the level was not run")
    for (target, level), result in after.items():
        if (target, level) not in before:
            yield Change(target=target, level=level, name="", verdict=NEW, reason="the level was not run before")
            yield from (_new_check(result, check) for check in result.checks if check.passed is False)


def _check_changes(old: LevelResult, new: LevelResult) -> Iterator[Change]:
    before, after = ({check.name: check for check in result.checks} for result in (old, new))
    regimes = {row.label: row for row in new.comparisons}
    place: dict[str, Any] = {"target": old.target, "level": old.level}
    gone = [row for row in old.comparisons if row.label not in regimes]
    for row in gone:
        yield Change(**place, name=row.label, verdict=GONE, reason="the comparison is gone")
    for name, check in before.items():
        if name in after:
            yield Change(**place, name=name, **_judged(check, after[name]))
        elif not any(check in row.checks for row in gone):
            yield Change(**place, name=name, old=check.value, verdict=GONE, reason="the check is gone")
    yield from (_new_check(new, check) for name, check in after.items() if name not in before)


def _new_check(result: LevelResult, check: Check) -> Change:
    verdict, reason = NEW, "a new check"
    if check.passed is False:
        verdict, reason = REGRESSED, f"a new check, and fails: {'; '.join(check.failures[:1])}"
    return Change(
        target=result.target, level=result.level, name=check.name, new=check.value, verdict=verdict, reason=reason
    )


# --- whether there is anything to compare
def comparison_problems(old: ParityReport, new: ParityReport) -> list[str]:
    """In what two reports differ that makes their figures no comparison; empty if in nothing."""
    problems = [
        f"{what} {before} is not {after}"
        for what, before, after in (
            ("the model's checkpoint", *(_short(report.model.get("checkpoint")) for report in (old, new))),
            *((f"the text's {key}", *(_short(report.text[key]) for report in (old, new))) for key in _TEXT),
        )
        if before != after
    ]
    return problems or [*_reference_problems(old, new), *_amount_problems(old, new)]


def _reference_problems(old: ParityReport, new: ParityReport) -> Iterator[str]:
    """PyTorch FP32's own perplexity moved: something is wrong with one of the two measurements."""
    references = {(row.target, row.label): row.reference_perplexity for row in old.rows if row.regime != GAP}
    for row in new.rows:
        before, after = references.get((row.target, row.label)), row.reference_perplexity
        if before is not None and after is not None and abs(after - before) > _REFERENCE_NOISE * before:
            place = f"{row.target} {row.label}"
            yield f"PyTorch FP32's own perplexity in {place} was {before:.6g} and is {after:.6g}"
            return


def _amount_problems(old: ParityReport, new: ParityReport) -> Iterator[str]:
    """A level that now fails may have ended early: that is a regression, and not another measurement."""
    for result in new.levels:
        earlier = old.result(result.target, result.level)
        if earlier is None or (result.passed is False and earlier.passed is not False):
            continue
        amounts = [_amount(entry.level, entry.data) for entry in (earlier, result)]
        if all(amounts) and amounts[0] != amounts[1]:
            words = [", ".join(f"{key} {value}" for key, value in amount.items()) for amount in amounts]
            yield f"{result.target} {result.level} measured {words[0]} and now {words[1]}"
            return


def _amount(level: str, data: Mapping[str, Any]) -> dict[str, Any]:
    if level == LONG_RUN:
        return {str(run.get("kind")): run.get("tokens") for run in data.get("runs") or []}
    return {key: data[key] for key in _AMOUNTS.get(level, ()) if data.get(key) is not None}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:16]}..."


# --- judging
def _judged(old: Check, new: Check) -> dict[str, Any]:
    """Old and new figure, noise, verdict and reason of one check."""
    figures = {"old": old.value, "new": new.value}
    if new.passed is False and old.passed is not False:
        before = "held" if old.passed else "was only reported"
        return {**figures, "verdict": REGRESSED, "reason": f"{before}, and fails: {'; '.join(new.failures[:1])}"}
    if old.passed is True and new.passed is None:
        return {**figures, "verdict": REGRESSED, "reason": "was a gate, and is only reported"}
    if old.passed is False and new.passed is True:
        return {**figures, "verdict": IMPROVED, "reason": "failed, and holds"}
    if old.value is None:
        return figures
    if new.value is None:
        return {**figures, "verdict": REGRESSED, "reason": f"was {_figure(old.value)}, and is no number"}
    noise = _noise(old, new)
    worse = _badness(new) - _badness(old)
    verdict = SAME
    if worse > noise:
        verdict = WORSE if new.passed is None else REGRESSED
    elif worse < -noise:
        verdict = IMPROVED
    return {**figures, "noise": noise, "verdict": verdict}


def _badness(check: Check) -> float:
    """The figure so that more is worse."""
    value = check.value or 0.0
    return {AT_MOST: value, AT_LEAST: -value, WITHIN: abs(value)}[check.relation]


def _noise(old: Check, new: Check) -> float:
    halves = [_half_width(check.interval) for check in (old, new)]
    known = [half for half in halves if half is not None]
    if known:
        # An interval that one report lacks is taken to be as wide as the other's.
        noise = math.hypot(*(known if len(known) == 2 else known * 2))
    else:
        value = old.value or 0.0
        share = old.relation == AT_LEAST and 0 <= value <= 1
        noise = FACTOR_WITHOUT_INTERVAL * abs(1 - value if share else value)
    rooms = [_room(check.limit, check.relation) for check in (old, new) if check.limit is not None]
    return max(noise, SHARE_OF_LIMIT * min(rooms, default=0.0))


def _half_width(interval: Sequence[float | None] | None) -> float | None:
    if interval is None or interval[0] is None or interval[1] is None:
        return None
    return (interval[1] - interval[0]) / 2


def _room(limit: float, relation: str) -> float:
    """What a limit leaves room for: of a share that must be at least 0.98, the 0.02."""
    return 1 - abs(limit) if relation == AT_LEAST and abs(limit) < 1 else abs(limit)


# --- what else differs
def _notes(old: ParityReport, new: ParityReport) -> Iterator[str]:
    for first, second in ((old.versions, new.versions), (old.environment, new.environment)):
        for key in dict.fromkeys((*first, *second)):
            if first.get(key) != second.get(key):
                yield f"{key}: {first.get(key, 'none')} before, {second.get(key, 'none')} now"
    before, after = _limits(old.tolerances), _limits(new.tolerances)
    for key in dict.fromkeys((*before, *after)):
        if before.get(key) != after.get(key):
            yield f"limit {key}: {_figure(before.get(key))} before, {_figure(after.get(key))} now"


def _limits(tolerances: Mapping[str, Any]) -> dict[str, float | None]:
    limits = {}
    for name, value in tolerances.items():
        entries = value.items() if isinstance(value, Mapping) else [("", value)]
        limits |= {f"{name}.{key}".rstrip("."): limit for key, limit in entries}
    return limits
