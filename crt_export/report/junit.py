"""JUnit XML, which CI systems show as test results: one case per check."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from crt_export.parity.levels import NOT_COMPARED, OWN_MODEL
from crt_export.parity.metrics import Check
from crt_export.parity.report import COMPILED, ParityReport
from crt_export.report.output import write_output
from crt_export.visible import visible

_NOT_GATED = "reported, not gated"
#: What XML 1.0 cannot hold in any spelling: surrogates, U+FFFE and U+FFFF; visible() leaves no control characters.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, kw_only=True)
class JUnitCase:
    """One check as CI systems list it.

    Attributes:
        suite: What it belongs to; cases of one suite are shown together: ``ort-cpu-int8 one-step``.
        name: What was checked, unique within the suite.
        failures: Sentences on what is wrong; empty where nothing is.
        skipped: Why nothing was judged; None where something was.
    """

    suite: str
    name: str
    failures: tuple[str, ...] = ()
    skipped: str | None = None


def junit_cases(report: ParityReport) -> list[JUnitCase]:
    """The checks of a parity report, target by target, and the engines that were compiled and not run."""
    cases = []
    for result in report.levels:
        suite = f"{result.target} {result.level}"
        reason = NOT_COMPARED if result.level == OWN_MODEL else _NOT_GATED
        cases += [_case(suite, check, reason) for check in result.checks]
        cases += [
            JUnitCase(suite=suite, name=row.label, skipped=f"{COMPILED}, not run here")
            for row in result.comparisons
            if row.status == COMPILED
        ]
    return cases


def _case(suite: str, check: Check, reason: str) -> JUnitCase:
    """A check that failed without a sentence still fails."""
    failures = check.failures or (("failed",) if check.passed is False else ())
    skipped = reason if check.passed is None and not failures else None
    return JUnitCase(suite=suite, name=check.name, failures=failures, skipped=skipped)


def junit_xml(cases: Iterable[JUnitCase]) -> bytes:
    """The cases as JUnit XML, UTF-8.

    Args:
        cases: In the order to be shown; suites stand in the order of their first case.

    Returns:
        ``<testsuites>`` of ``<testsuite>`` of ``<testcase>``, with the counts that CI systems read. Characters that XML
        cannot hold are written as Python would escape them.
    """
    suites: dict[str, list[JUnitCase]] = {}
    for case in cases:
        suites.setdefault(case.suite, []).append(case)
    everything = [case for members in suites.values() for case in members]
    root = ElementTree.Element("testsuites", {"name": "crt-export", **_counts(everything)})
    for suite, members in suites.items():
        element = ElementTree.SubElement(root, "testsuite", {"name": _legal(suite), **_counts(members)})
        for case in members:
            _append_case(element, case)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def write_junit(path: Path, cases: Iterable[JUnitCase]) -> None:
    """Write the cases as JUnit XML, whole or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    write_output(path, junit_xml(cases))


def _append_case(suite: ElementTree.Element, case: JUnitCase) -> None:
    element = ElementTree.SubElement(suite, "testcase", {"classname": _legal(case.suite), "name": _legal(case.name)})
    if case.failures:
        # One element with all sentences: several CI systems read the first <failure> only.
        failure = ElementTree.SubElement(element, "failure", {"message": _legal(case.failures[0]), "type": "parity"})
        failure.text = _legal("\n".join(case.failures))
    elif case.skipped is not None:
        ElementTree.SubElement(element, "skipped", {"message": _legal(case.skipped)})


def _counts(cases: Sequence[JUnitCase]) -> dict[str, str]:
    failed = sum(bool(case.failures) for case in cases)
    skipped = sum(case.skipped is not None and not case.failures for case in cases)
    return {"tests": str(len(cases)), "failures": str(failed), "errors": "0", "skipped": str(skipped)}


def _legal(text: str) -> str:
    return _ILLEGAL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), visible(text))
