"""Sampling is a specification: fixed random numbers, fixed order, fixed ties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crt_export.errors import ContractError, InputError
from crt_export.runtime.sampling import SamplingOptions, philox4x32, sample_token, uniform

ALL = 0xFFFFFFFF


# Random123, tests/kat_vectors, "philox4x32 10": counter, key, expected words.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: Any, key: Any, words: Any) -> None:
    assert philox4x32(counter, key) == words


def test_the_draw_is_the_top_53_bits_of_the_first_two_words() -> None:
    assert uniform(0, 0, 0) == (0x6627E8D5E169C58D >> 11) / 2**53


def test_seed_row_and_step_each_give_other_numbers() -> None:
    numbers = {uniform(s, r, t) for s in (0, 1, ALL) for r in (0, 1) for t in (0, 1, 2**32, 2**40)}
    assert len(numbers) == 24
    assert all(0 <= number < 1 for number in numbers)


def draw_many(logits: np.ndarray, count: int, **options: Any) -> np.ndarray:
    chosen = SamplingOptions(**options)
    draws = [sample_token(logits, chosen, row=0, step=step) for step in range(count)]
    return np.bincount(draws, minlength=logits.size) / count


def test_frequencies_follow_the_softmax() -> None:
    logits = np.array([0.5, 2.0, -1.0, 1.0], np.float32)
    for temperature in (0.5, 1.0, 2.0):
        weights = np.exp(logits / temperature)
        found = draw_many(logits, 4000, temperature=temperature, seed=9)
        # Four standard deviations of a frequency over 4,000 draws.
        np.testing.assert_allclose(found, weights / weights.sum(), atol=4 * 0.5 / math.sqrt(4000))


def test_top_k_keeps_the_likeliest_and_ties_go_to_the_lower_id() -> None:
    logits = np.array([1, 3, 2, 3, 2, 2], np.float32)
    assert np.flatnonzero(draw_many(logits, 300, temperature=1.0, top_k=2)).tolist() == [1, 3]
    assert np.flatnonzero(draw_many(logits, 300, temperature=1.0, top_k=3)).tolist() == [1, 2, 3]
    assert np.flatnonzero(draw_many(logits, 300, temperature=1.0, top_k=99)).size == 6


def test_top_p_keeps_the_shortest_prefix_that_reaches_it() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    assert np.flatnonzero(draw_many(logits, 300, temperature=1.0, top_p=0.4)).tolist() == [1]
    assert np.flatnonzero(draw_many(logits, 300, temperature=1.0, top_p=0.7)).tolist() == [1, 3]
    assert np.flatnonzero(draw_many(logits, 300, temperature=1.0, top_p=0.8)).tolist() == [1, 2, 3]


def test_top_p_counts_what_top_k_has_left() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    # Of the two kept by top_k the first holds two thirds: enough for 0.6, though it is half of the whole.
    found = draw_many(logits, 300, temperature=1.0, top_k=2, top_p=0.6)
    assert np.flatnonzero(found).tolist() == [1]


@given(
    logits=st.lists(st.integers(-8, 8), min_size=1, max_size=40),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, ALL),
)
@settings(deadline=None, max_examples=200, derandomize=True)
def test_it_is_the_plain_reading_of_the_specification(
    logits: list[int], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: top_k or None]
    weights = [math.exp((logits[token] - max(logits)) / temperature) for token in ranked]
    total, kept = 0.0, 0
    nucleus = top_p * math.fsum(weights)
    for weight in weights:
        total, kept = total + weight, kept + 1
        # Where the mass reached equals top_p but for rounding, either side is right; the exact tie has its own test.
        assume(abs(total - nucleus) > 1e-9 * nucleus or kept == len(weights))
        if total >= nucleus:
            break
    target = uniform(seed, 5, 11) * math.fsum(weights[:kept])
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    found = sample_token(np.array(logits, np.float32), options, row=5, step=11)
    rank = ranked.index(found)
    below = math.fsum(weights[:rank])
    assert rank < max(kept, 1)
    assert below - 1e-9 <= target <= below + weights[rank] + 1e-9


def test_temperature_zero_takes_the_likeliest_and_the_lower_of_equals() -> None:
    logits = np.array([1, 3, 3, 2], np.float32)
    assert sample_token(logits, SamplingOptions(), row=0, step=0) == 1


def test_a_tiny_temperature_is_greedy_and_not_an_overflow() -> None:
    logits = np.array([1, 3, 2, -3e38], np.float32)
    for temperature in (1e-3, 1e-300):
        options = SamplingOptions(temperature=temperature)
        assert {sample_token(logits, options, row=0, step=step) for step in range(20)} == {1}


def test_tokens_masked_with_minus_infinity_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    assert np.flatnonzero(draw_many(logits, 200, temperature=1.0)).tolist() == [1, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    with pytest.raises(ContractError, match="row 3: its logits are not finite"):
        sample_token(np.array([0, bad], np.float32), SamplingOptions(temperature=temperature), row=3, step=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed must be between 0 and 4294967295"),
        ({"seed": -1, "top_p": 2.0}, "2 problems"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingOptions(**options)


def test_top_p_stops_where_its_mass_is_reached_exactly() -> None:
    """Two equal tokens and top_p one half: the first alone holds that mass."""
    logits = np.zeros(2, np.float32)
    found = {
        sample_token(logits, SamplingOptions(temperature=1.0, top_p=0.5, seed=seed), row=0, step=0)
        for seed in range(32)
    }
    assert found == {0}
