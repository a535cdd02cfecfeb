"""The self-test as cases of a JUnit file: one per target and replay."""

from __future__ import annotations

from crt_export.report.junit import JUnitCase
from crt_export.selftest.report import SelftestReport


def junit_cases(report: SelftestReport) -> list[JUnitCase]:
    """A case per replay; a target that did not run is one skipped case, or a failed one where it was asked for."""
    cases: list[JUnitCase] = []
    for target in report.targets:
        suite = f"{target.target} selftest"
        for replay in target.replays:
            cases.append(JUnitCase(suite=suite, name=replay.replay, failures=replay.failures))
        if target.status == "not run":
            reason = f"not run here: {target.reason}"
            asked = target.target in report.asked
            cases.append(
                JUnitCase(suite=suite, name="open", failures=(reason,) * asked, skipped=None if asked else reason)
            )
    return cases
