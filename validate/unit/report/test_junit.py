from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from crt_export.errors import InputError
from crt_export.report.junit import JUnitCase, junit_xml, write_junit

CASES = [
    JUnitCase(suite="ort-cpu-fp32 chain", name="step: logits"),
    JUnitCase(suite="ort-cpu-fp32 chain", name="step: next_state", failures=("is 3, expected at most 1", "and NaN")),
    JUnitCase(suite="ort-cpu-int8 chain", name="growth", skipped="reported, not gated"),
]


def parsed(cases: list[JUnitCase]) -> ElementTree.Element:
    return ElementTree.fromstring(junit_xml(cases))


def test_counts_are_those_of_the_cases() -> None:
    root = parsed(CASES)
    assert root.tag == "testsuites"
    assert {key: root.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3", "failures": "1", "errors": "0", "skipped": "1",
    }  # fmt: skip
    assert [(suite.get("name"), suite.get("tests"), suite.get("failures")) for suite in root] == [
        ("ort-cpu-fp32 chain", "2", "1"),
        ("ort-cpu-int8 chain", "1", "0"),
    ]


def test_a_failure_holds_every_sentence_and_its_first_as_message() -> None:
    (failure,) = parsed(CASES).iter("failure")
    assert failure.get("message") == "is 3, expected at most 1"
    assert failure.text == "is 3, expected at most 1\nand NaN"
    (skipped,) = parsed(CASES).iter("skipped")
    assert skipped.get("message") == "reported, not gated"


def test_cases_of_one_suite_stand_together_though_given_apart() -> None:
    apart = [JUnitCase(suite="a", name="1"), JUnitCase(suite="b", name="2"), JUnitCase(suite="a", name="3")]
    assert [[case.get("name") for case in suite] for suite in parsed(apart)] == [["1", "3"], ["2"]]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>&\"'", "<script>&\"'"),
        ("bell\x07 null\x00 escape\x1b[31m", "bell\\x07 null\\x00 escape\\x1b[31m"),
        ("half a pair \ud83d", "half a pair \\ud83d"),
        ("no character \ufffe", "no character \\ufffe"),
        ("naïve 😀", "naïve 😀"),
    ],
)
def test_any_text_gives_xml_that_parses(text: str, shown: str) -> None:
    root = parsed([JUnitCase(suite=text, name=text, failures=(text,))])
    case = root.find("testsuite/testcase")
    assert case is not None
    assert (case.get("classname"), case.get("name"), case.findtext("failure")) == (shown, shown, shown)


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    write_junit(path, CASES)
    assert ElementTree.parse(path).getroot().get("tests") == "3"
    with pytest.raises(InputError, match="does not exist"):
        write_junit(tmp_path / "absent" / "junit.xml", CASES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["junit.xml"]
