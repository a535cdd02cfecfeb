"""What a verdict says of the user's own model, for every report that the schema allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from crt_export.parity import ParityReport
from crt_export.parity.levels import NOT_COMPARED, OWN_MODEL
from crt_export.report.junit import junit_cases
from crt_export.report.output import render_html
from crt_export.report.reading import checked_report
from crt_export.report.verdict import own_model_text, verdict_of, was_compared

Report = dict[str, Any]
CHECK = {
    "name": "logits", "metric": "own_model_logits", "value": 2e-6, "interval": None, "limit": 1e-3,
    "tolerance": "shared.own_model_error", "passed": True, "failures": [],
}  # fmt: skip
DATA = {"positions": 1024, "passes": "exact"}


@pytest.fixture
def report(make_report: Callable[..., Report]) -> Report:
    return make_report(targets=1, levels=("contract",))


def level(passed: bool | None, checks: list[Report], data: Report) -> Report:
    return {"level": OWN_MODEL, "target": "pytorch-fp32", "passed": passed, "checks": checks, "data": data, "notes": []}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (level(None, [], {}), NOT_COMPARED),
        (
            level(True, [CHECK], DATA),
            "agrees with your own model (largest difference of logits 2.0e-06 of their deviation, limit 0.001, "
            "1,024 positions, exact recurrence)",
        ),
        (
            level(False, [CHECK, {**CHECK, "name": "hidden", "value": 0.5, "passed": False}], {**DATA, "passes": 10}),
            "does NOT agree with your own model (largest difference of hidden 5.0e-01 of their deviation, limit 0.001, "
            "1,024 positions, 10 passes)",
        ),
        (
            level(False, [{**CHECK, "value": None, "passed": False}], {}),
            "does NOT agree with your own model (limit 0.001)",
        ),
    ],
)  # fmt: skip
def test_the_outcome_in_words(report: Report, found: Report, text: str) -> None:
    report["levels"][0] = found
    parity = checked_report(report, "the report")
    assert own_model_text(parity) == text
    assert was_compared(parity) is (found["passed"] is not None)
    assert verdict_of(parity).own_model == f"{text[0].upper()}{text[1:]}."
    assert text[1:] in render_html(parity)


def test_a_report_without_the_level_was_not_compared(report: Report) -> None:
    del report["levels"][0]
    assert own_model_text(ParityReport.from_dict(report)) == own_model_text(None) == NOT_COMPARED


def test_ci_shows_a_skipped_case(report: Report) -> None:
    (case,) = [
        case for case in junit_cases(ParityReport.from_dict(report)) if case.suite == f"pytorch-fp32 {OWN_MODEL}"
    ]
    assert (case.name, case.skipped) == ("logits", NOT_COMPARED)
