"""compare: what counts as a regression, what as noise, and what cannot be compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from crt_export.errors import InputError
from crt_export.parity import ParityReport
from crt_export.parity.levels import LEVELS, OWN_MODEL
from crt_export.report import compare
from crt_export.report.compare import GONE, IMPROVED, NEW, REGRESSED, SAME, WORSE, Change, Comparison
from crt_export.report.junit import junit_xml

Report = dict[str, Any]
NAMES = ("old.json", "new.json")
TARGET = "ort-cpu-int8"


def compare_reports(old: Report, new: Report, *, names: tuple[str, str]) -> Comparison:
    return compare.compare_reports(ParityReport.from_dict(old), ParityReport.from_dict(new), names=names)


def changes(old: Report, new: Report, *verdicts: str) -> list[Change]:
    """Those changes that came out in one of these ways; all that are not the same without any."""
    found = compare_reports(old, new, names=NAMES).changes
    return [change for change in found if (change.verdict in verdicts if verdicts else change.verdict != SAME)]


def check(report: Report, level: str, number: int = 0, target: str = TARGET) -> Report:
    result = next(r for r in report["levels"] if (r["target"], r["level"]) == (target, level))
    return result["checks"][number]


@pytest.fixture
def old(make_report: Callable[..., Report]) -> Report:
    return make_report(targets=2)


@pytest.fixture
def new(old: Report) -> Report:
    return copy.deepcopy(old)


def test_a_report_is_the_same_as_itself(old: Report, new: Report) -> None:
    result = compare_reports(old, new, names=NAMES)
    assert result.passed
    assert {change.verdict for change in result.changes} == {SAME}
    judged = {(change.target, change.level) for change in result.changes}
    assert {level for target, level in judged if target == TARGET} == set(LEVELS) - {OWN_MODEL}
    assert {level for target, level in judged if target == "pytorch-fp32"} == {OWN_MODEL}


def test_a_gate_that_held_and_fails_is_a_regression_whatever_its_figure(old: Report, new: Report) -> None:
    check(new, "contract", 1).update(passed=False, failures=["an unused input"])
    (change,) = changes(old, new)
    assert (change.place, change.verdict) == (f"{TARGET} contract: prefill: names and dtypes", REGRESSED)
    assert "an unused input" in change.reason
    (change,) = changes(new, old)
    assert change.verdict == IMPROVED


def test_a_gate_that_only_reports_now_is_a_regression(old: Report, new: Report) -> None:
    check(new, "corpus").update(passed=None, limit=None)
    assert [change.verdict for change in changes(old, new)] == [REGRESSED]


def test_a_figure_that_was_only_reported_and_now_fails_is_a_regression(old: Report, new: Report) -> None:
    check(old, "contract", 1).update(passed=None)
    check(new, "contract", 1).update(passed=False, failures=["an unused input"])
    (change,) = changes(old, new)
    assert change.verdict == REGRESSED
    assert "was only reported, and fails: an unused input" in change.reason


def test_new_checks_come_in_their_order_and_one_that_fails_is_a_regression(old: Report, new: Report) -> None:
    for name in ("one", "two", "three", "four"):
        added = {**check(new, "contract", 1), "name": name}
        if name == "three":
            added.update(passed=False, failures=["an unused input"])
        next(r for r in new["levels"] if (r["target"], r["level"]) == (TARGET, "contract"))["checks"].append(added)
    found = changes(old, new)
    assert [change.name for change in found] == ["one", "two", "three", "four"]
    assert [change.verdict for change in found] == [NEW, NEW, REGRESSED, NEW]
    assert not compare_reports(old, new, names=NAMES).passed


def test_a_level_that_is_new_and_fails_is_a_regression(old: Report, new: Report) -> None:
    without_level(old)
    check(new, "chain").update(passed=False, failures=["off at step 3"])
    assert [change.verdict for change in changes(old, new)] == [NEW, REGRESSED]


def without_target(report: Report) -> None:
    report["levels"] = [entry for entry in report["levels"] if entry["target"] != TARGET]


def without_level(report: Report) -> None:
    report["levels"] = [r for r in report["levels"] if (r["target"], r["level"]) != (TARGET, "chain")]


def without_check(report: Report) -> None:
    next(r for r in report["levels"] if (r["target"], r["level"]) == (TARGET, "one-step"))["checks"].pop(3)


def corpus(report: Report) -> Report:
    return next(r for r in report["levels"] if (r["target"], r["level"]) == (TARGET, "corpus"))


def without_regime(report: Report) -> None:
    del corpus(report)["data"]["regimes"]["prefill"]
    corpus(report)["checks"] = [c for c in corpus(report)["checks"] if not c["name"].startswith("prefill: ")]


@pytest.mark.parametrize("remove", [without_target, without_level, without_check, without_regime])
def test_what_is_gone_is_one_regression_and_what_is_added_is_none(
    old: Report, new: Report, remove: Callable[[Report], None]
) -> None:
    remove(new)
    (change,) = changes(old, new)
    assert (change.target, change.verdict) == (TARGET, GONE)
    assert compare_reports(new, old, names=NAMES).passed
    assert {change.verdict for change in changes(new, old)} <= {NEW}


@pytest.mark.parametrize(
    ("level", "number", "factor", "verdict"),
    [
        ("one-step", 0, 1.2, SAME),  # 0.010 of 0.05: below a quarter more
        ("one-step", 0, 1.6, REGRESSED),
        ("one-step", 0, 0.4, IMPROVED),
        ("one-step", 13, 3.0, SAME),  # far more, and still far below a tenth of the limit
        ("chain", 0, 1.35, REGRESSED),
    ],
)
def test_figures_without_an_interval(
    old: Report, new: Report, level: str, number: int, factor: float, verdict: str
) -> None:
    check(new, level, number)["value"] *= factor
    assert [change.verdict for change in changes(old, new)] == ([verdict] if verdict != SAME else [])


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [
        (2.5e-4, SAME),  # the half width is 2.3e-4, in quadrature 3.3e-4
        (4e-4, REGRESSED),
        (-4.4e-4 + 1e-5, SAME),  # the other sign and as large
        (-9e-4, REGRESSED),
    ],
)
def test_an_interval_makes_the_noise(old: Report, new: Report, shift: float, verdict: str) -> None:
    found = check(new, "corpus")
    found["value"] += shift
    found["interval"] = [end + shift for end in found["interval"]]
    assert [change.verdict for change in changes(old, new)] == ([verdict] if verdict != SAME else [])


def test_a_share_is_worse_when_it_falls(old: Report, new: Report) -> None:
    found = check(new, "corpus", 1)
    found["value"] -= 0.004
    found["interval"] = [end - 0.004 for end in found["interval"]]
    assert [change.verdict for change in changes(old, new)] == [REGRESSED]
    assert [change.verdict for change in changes(new, old)] == [IMPROVED]


def test_what_is_not_gated_is_listed_and_does_not_fail(old: Report, new: Report) -> None:
    check(new, "free-running", 1)["value"] /= 2
    assert [change.verdict for change in changes(old, new)] == [WORSE]
    assert compare_reports(old, new, names=NAMES).passed


def test_a_figure_that_is_no_number_any_more_is_a_regression(old: Report, new: Report) -> None:
    check(new, "long-run").update(value=None, interval=None)
    (change,) = changes(old, new)
    assert (change.verdict, change.old) == (REGRESSED, check(old, "long-run")["value"])


def test_every_figure_of_a_regime_is_judged_once(old: Report, new: Report) -> None:
    next(check for check in corpus(new)["checks"] if check["name"] == "prefill: mean_kl")["value"] *= 30
    assert [change.name for change in changes(old, new, REGRESSED)] == ["prefill: mean_kl"]
    names = [
        c.name for c in compare_reports(old, new, names=NAMES).changes if (c.target, c.level) == (TARGET, "corpus")
    ]
    assert names == [check["name"] for check in corpus(old)["checks"]]


def of_other_text(report: Report) -> None:
    report["text"]["sha256"] = "00" * 32


def of_other_model(report: Report) -> None:
    report["model"]["checkpoint"] = "00" * 32


def with_other_reference(report: Report) -> None:
    corpus(report)["data"]["regimes"]["step"]["reference_nll"] += 0.001


def with_fewer_prompts(report: Report) -> None:
    for result in report["levels"]:
        if result["level"] == "free-running":
            result["data"]["prompts"] = 8


def with_shorter_run(report: Report) -> None:
    for result in report["levels"]:
        if result["level"] == "long-run":
            result["data"]["runs"][0]["tokens"] = 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_other_text, "the text's sha256"),
        (of_other_model, "the model's checkpoint"),
        (with_other_reference, "PyTorch FP32's own perplexity"),
        (with_fewer_prompts, "prompts 32.* and now prompts 8"),
        (with_shorter_run, "single 20480.* and now single 4096"),
    ],
)
def test_what_is_not_comparable_is_refused_and_both_are_named(
    old: Report, new: Report, change: Callable[[Report], None], message: str
) -> None:
    change(new)
    with pytest.raises(InputError, match=message) as caught:
        compare_reports(old, new, names=NAMES)
    assert all(name in str(caught.value) for name in NAMES)


def test_a_level_that_failed_early_is_a_regression_and_not_another_measurement(old: Report, new: Report) -> None:
    result = next(r for r in new["levels"] if (r["target"], r["level"]) == (TARGET, "chain"))
    result["passed"] = False
    result["data"]["steps"] = 11
    result["checks"][0].update(passed=False, value=None, failures=["NaN at step 12"])
    assert [change.verdict for change in changes(old, new)] == [REGRESSED]


def test_rounding_of_another_machine_is_comparable_and_versions_are_noted(old: Report, new: Report) -> None:
    for regime in corpus(new)["data"]["regimes"].values():
        regime["reference_nll"] += 1e-7
    new["versions"]["onnxruntime"] = "1.32.0"
    new["tolerances"]["w8"]["mean_kl"] *= 2
    result = compare_reports(old, new, names=NAMES)
    assert result.passed
    assert "onnxruntime: 1.31.1 before, 1.32.0 now" in result.notes
    assert any(note.startswith("limit w8.mean_kl") for note in result.notes)


def test_junit_has_a_failure_per_regression(old: Report, new: Report) -> None:
    without_level(new)
    check(new, "contract").update(passed=False, failures=["<b>"])
    result = compare_reports(old, new, names=NAMES)
    text = junit_xml(result.junit_cases()).decode()
    assert text.count("<failure") == 2 == len(result.regressions)
    assert f'tests="{len(result.changes)}" failures="2"' in text
    document = result.to_dict()
    assert (document["passed"], len(document["changes"])) == (False, len(result.changes))
