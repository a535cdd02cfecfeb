"""A stop string ends the text where it begins, however the text is cut into pieces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crt_export.runtime.row_text import StopMatcher


def passed_on(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    """The text that comes out, and the stop string that ended it."""
    matcher = StopMatcher(stops)
    shown = [matcher.push(piece) for piece in pieces]
    return "".join([*shown, matcher.finish()]), matcher.found


def plainly_read(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first to be complete, of several the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "found"),
    [
        (["abc"], [], "abc", None),
        (["abc"], ["x"], "abc", None),
        (["one STOP two"], ["STOP"], "one ", "STOP"),
        (["one S", "T", "OP two"], ["STOP"], "one ", "STOP"),
        (["STOP"], ["STOP"], "", "STOP"),
        (["one ST"], ["STOP"], "one ST", None),
        # The first one to be complete wins, though another began before it.
        (["abcd"], ["abcd", "bc"], "a", "bc"),
        # Of two that are complete at once the longer one.
        (["xabc"], ["bc", "abc"], "x", "abc"),
        # A prefix of a stop string that starts again within itself.
        (["aab", "aaab"], ["aaab"], "aab", "aaab"),
        (["é è", "ü"], ["èü"], "é ", "èü"),
        (["\U0001f600", "\U0001f601!"], ["\U0001f601"], "\U0001f600", "\U0001f601"),
    ],
)
def test_text_ends_before_the_stop_string(pieces: list[str], stops: list[str], shown: str, found: Any) -> None:
    assert passed_on(pieces, stops) == (shown, found)


@given(
    pieces=st.lists(st.text(alphabet="abé", max_size=5), max_size=8),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
@example(pieces=["a", "aé", "b"], stops=["aéa", "éb"])
@settings(deadline=None, max_examples=300, derandomize=True)
def test_the_cut_of_the_text_does_not_matter(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    expected = plainly_read(text, stops)
    assert passed_on(pieces, stops) == expected
    assert passed_on(list(text), stops) == expected
    assert passed_on([text], stops) == expected


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:", "###"])
    assert matcher.push("Hello\nUs") == "Hello"
    assert matcher.push("e it #") == "\nUse it "
    assert matcher.push("#") == ""
    assert matcher.push("1") == "##1"
    assert matcher.push("\n") == ""
    assert matcher.finish() == "\n"
    assert matcher.finish() == ""


def test_nothing_comes_out_after_a_stop_string() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("End. More") == "End"
    assert matcher.push("Even more.") == ""
    assert matcher.finish() == ""
    assert matcher.found == "."
