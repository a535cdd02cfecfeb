"""Options are kept as plain values, whatever kind of number or list they came in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crt_export.errors import InputError
from crt_export.runtime import GenerationOptions, SamplingOptions, sample_token

INTEGERS = [np.int16, np.int32, np.uint32, np.int64, np.uint64]
LOGITS = np.linspace(-1, 1, 64, dtype=np.float32)


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_seed_of_numpy_draws_what_the_plain_one_draws(kind: Any) -> None:
    plain, other = (SamplingOptions(temperature=5.0, seed=seed) for seed in (4321, kind(4321)))
    drawn = [sample_token(LOGITS, plain, row=3, step=step) for step in range(40)]
    assert [sample_token(LOGITS, other, row=kind(3), step=kind(step)) for step in range(40)] == drawn


def test_every_number_becomes_a_plain_one() -> None:
    given: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "top_k": np.int8(3),
        "top_p": np.float16(0.5),
        "min_p": np.float64(0.25),
        "repetition_penalty": np.int64(2),
        "seed": np.uint32(5),
    }
    options = SamplingOptions(**given)
    assert [type(value) for value in vars(options).values()] == [float, int, float, float, float, int]
    assert options == SamplingOptions(temperature=0.5, top_k=3, top_p=0.5, min_p=0.25, repetition_penalty=2, seed=5)
    narrow: Any = np.int8(2)
    generation = GenerationOptions(max_new_tokens=narrow, passes=narrow)
    assert [type(value) for value in (generation.max_new_tokens, generation.passes)] == [int, int]


@pytest.mark.parametrize("value", [10**400, 10**5000], ids=["400 digits", "5000 digits"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "seed"])
def test_a_number_beyond_float64_is_refused(name: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"{name} must be .*, found (1000|a number of more than 4300 digits)"):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize("wrong", [{"row": -1, "step": 0}, {"row": 0, "step": 1.5}, {"row": True, "step": 0}])
def test_row_and_step_of_a_draw_are_counts(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"(row|step) must be (at least 0|a whole number), found"):
        sample_token(LOGITS, SamplingOptions(temperature=1.0), **wrong)


def test_a_narrow_max_new_tokens_does_not_wrap_past_the_capacity(crt: Any) -> None:
    narrow: Any = np.int8(120)
    with crt.session(capacity=32) as session, pytest.raises(InputError, match="exceed the capacity of 32"):
        session.generate([crt.ids(20)], GenerationOptions(max_new_tokens=narrow))


@pytest.mark.parametrize("make", [list, set, iter, lambda values: (value for value in values)])
def test_stops_are_kept_as_tuples(make: Any) -> None:
    options = GenerationOptions(stop_token_ids=make([np.int64(7), 9]), stop_strings=make(["##", "ab"]))
    assert (sorted(options.stop_token_ids), sorted(options.stop_strings)) == ([7, 9], ["##", "ab"])
    assert all(type(token) is int for token in options.stop_token_ids)
    assert isinstance(hash(options), int)


def test_a_list_that_changes_later_does_not_change_the_options() -> None:
    tokens, strings = [7], ["##"]
    options = GenerationOptions(stop_token_ids=tokens, stop_strings=strings)
    tokens.append(-1)
    strings.append("")
    assert (options.stop_token_ids, options.stop_strings) == ((7,), ("##",))


@pytest.mark.parametrize("value", ["###", b"###", 5])
def test_one_string_is_not_a_list_of_stop_strings(value: Any) -> None:
    with pytest.raises(InputError, match="stop_strings must be a list of strings such as"):
        GenerationOptions(stop_strings=value)
