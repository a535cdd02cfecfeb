"""Options that check themselves: plain values, or every problem in one sentence each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from crt_export.checked import FLAG, Checked, Rule, Rules, choice, plain_float, whole
from crt_export.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Dough(Checked):
    HEADING: ClassVar[str] = "dough"
    PREFIX: ClassVar[str] = "dough."
    RULES: ClassVar[Rules] = {
        "salt": Rule(plain_float, "above 0 and at most 1", lambda value: 0 < value <= 1),
        "loaves": whole("1 to 9", least=1, most=9),
        "hours": whole("at least 1", least=1, optional=True),
        "flour": choice("rye", "wheat"),
        "sour": FLAG,
    }
    salt: float = 0.5
    loaves: int = 1
    hours: int | None = None
    flour: str = "rye"
    sour: bool = True
    note: object = None

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[str]:
        if values.get("flour") == "wheat" and values.get("sour"):
            yield "sour is for rye"


def test_what_is_allowed_becomes_plain() -> None:
    numbers: dict[str, Any] = {"salt": np.float32(0.25), "loaves": np.int8(9), "hours": np.int64(3)}
    made = Dough(**numbers, note=[1])
    assert dataclasses.astuple(made) == (0.25, 9, 3, "rye", True, [1])
    assert [type(value) for value in (made.salt, made.loaves, made.hours)] == [float, int, int]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("salt", 0, "above 0 and at most 1, found 0"),
        ("salt", float("nan"), "found nan"),
        ("salt", 10**400, "above 0 and at most 1, found 1000"),
        pytest.param("salt", 10**5000, "found a number of more than 4300 digits", id="salt of 5,000 digits"),
        ("loaves", True, "1 to 9, found True"),
        ("loaves", 2.0, "1 to 9, found 2.0"),
        ("loaves", 10, "1 to 9, found 10"),
        ("loaves", None, "1 to 9, found None"),
        ("hours", 0, "at least 1, found 0"),
        ("flour", "rice" * 50, "one of rye, wheat, found 'ricerice"),
        ("flour", ["rye"], "one of rye, wheat, found ['rye']"),
        ("sour", 1, "true or false, found 1"),
    ],
)
def test_what_is_not_is_refused_with_what_was_found(field: str, value: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        Dough(**{field: value})  # pyright: ignore[reportArgumentType]
    assert f"dough: dough.{field} must be " in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200


def test_all_problems_are_in_one_error_and_conflicts_are_judged_between_right_values_only() -> None:
    with pytest.raises(InputError) as caught:
        Dough(salt=2, loaves=0, flour="wheat")
    assert str(caught.value).splitlines()[0] == "dough: 3 problems"
    assert "sour is for rye" in str(caught.value)
    assert Dough.judge({"flour": "wheat", "sour": "yes"})[1] == ["dough.sour must be true or false, found 'yes'"]


def test_absent_fields_are_not_judged() -> None:
    assert Dough.judge({"loaves": 2}) == ({"loaves": 2}, [])


def test_an_unknown_key_is_named_with_the_nearest_field() -> None:
    assert Dough.unknown_keys(["loafs", "salt", "zzz"]) == [
        "unknown key 'dough.loafs' (did you mean 'loaves'?)",
        "unknown key 'dough.zzz'",
    ]
