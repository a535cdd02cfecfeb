"""Sampling is a specification: fixed random numbers, fixed order, fixed ties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crt_export.errors import ContractError, InputError
from crt_export.runtime.sampling import SamplingOptions, philox4x32, sample_token, specified_exp, uniform

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


def plain_exp(x: float) -> float:
    """specified_exp as the specification reads, on Python's floats: the same roundings, another program."""
    if x < -700:
        return 0.0
    k = round(x * 1.4426950408889634)
    r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10
    p = 1.0 / math.factorial(13)
    for n in range(12, -1, -1):
        p = p * r + 1.0 / math.factorial(n)
    return math.ldexp(p, k)


def plain_sample(logits: np.ndarray, options: SamplingOptions, row: int, step: int, seen: np.ndarray) -> int:
    """sample_token as the specification reads, step by step and without numpy."""
    values = [float(logit) for logit in logits]
    penalty = options.repetition_penalty
    for token in np.flatnonzero(seen).tolist():
        if penalty != 1:
            values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if options.temperature == 0:
        return order[0]
    order = order[: options.top_k or None]
    weights = [plain_exp((values[token] - values[order[0]]) / options.temperature) for token in order]
    sums = [weights[0]]
    for weight in weights[1:]:
        sums.append(sums[-1] + weight)
    last = len(sums) - 1
    if options.top_p < 1:
        last = next(i for i, total in enumerate(sums) if total >= options.top_p * sums[-1])
    if options.min_p > 0:
        last = next((i - 1 for i in range(last + 1) if weights[i] < options.min_p * weights[0]), last)
    target = uniform(options.seed, row, step) * sums[last]
    return order[next((i for i in range(last) if sums[i] > target), last)]


@given(
    logits=st.lists(
        st.integers(-8, 8) | st.floats(-30, 30, width=32) | st.sampled_from([-math.inf, 0.0, -0.0, -3e38, 3e38]),
        min_size=1,
        max_size=40,
    ),
    seen=st.sets(st.integers(0, 39)),
    temperature=st.sampled_from([0.0, 1e-300, 1e300]) | st.floats(0.05, 5),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.25, 0.5, 1.0]) | st.floats(0.01, 1),
    min_p=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
    penalty=st.sampled_from([1.0, 1.3, 0.5]) | st.floats(0.1, 10),
    seed=st.integers(0, ALL),
)
@settings(deadline=None, max_examples=250, derandomize=True)
def test_it_is_the_plain_reading_of_the_specification(
    logits: list[float],
    seen: set[int],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seed: int,
) -> None:
    assume(max(logits) > -math.inf)
    options = SamplingOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=seed
    )
    marks = np.array([token in seen for token in range(len(logits))], np.uint8)
    for step in (11, 2**40):
        found = sample_token(np.array(logits, np.float32), options, row=5, step=step, seen=marks)
        assert found == plain_sample(np.array(logits, np.float32), options, 5, step, marks)


@given(x=st.floats(-700, 0))
@settings(deadline=None, max_examples=300, derandomize=True)
def test_the_exponential_is_the_specified_one_and_close_to_the_true_one(x: float) -> None:
    found = float(specified_exp(np.array([x]))[0])
    assert found == plain_exp(x)
    assert abs(found - math.exp(x)) <= math.ulp(math.exp(x))


def test_the_exponential_at_its_edges() -> None:
    edges = np.array([0.0, -0.0, -5e-324, -700.0, np.nextafter(-700.0, -701), -745.0, -1e308, -np.inf])
    assert specified_exp(edges).tolist() == [1, 1, 1, plain_exp(-700.0), 0, 0, 0, 0]


# What the specification gives, from Python's own arithmetic: known answers for other languages.
@pytest.mark.parametrize(
    ("x", "bits"),
    [
        (-0.5, "0x1.368b2fc6f960ap-1"),
        (-1.0, "0x1.78b56362cef38p-2"),
        (-19.823769801824078, "0x1.51dffd3771006p-29"),
        (-700.0, "0x1.14f2b0fb9307fp-1010"),
    ],
)
def test_the_exponential_has_these_bits(x: float, bits: str) -> None:
    assert float(specified_exp(np.array([x]))[0]).hex() == bits


def test_min_p_drops_what_is_less_likely_than_its_fraction_of_the_likeliest() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    assert np.flatnonzero(draw_many(logits, 300, temperature=1.0, min_p=0.4)).tolist() == [1, 3]
    assert np.flatnonzero(draw_many(logits, 300, temperature=1.0, min_p=0.25)).tolist() == [1, 2, 3]
    # The whole of the likeliest: only its equals reach it.
    tied = np.array([3, 3, 2], np.float32)
    assert np.flatnonzero(draw_many(tied, 300, temperature=1.0, min_p=1.0)).tolist() == [0, 1]


def test_a_token_with_exactly_the_fraction_of_min_p_stays() -> None:
    logits, fraction = np.array([1, 0], np.float32), float(specified_exp(np.array([-1.0]))[0])
    assert np.flatnonzero(draw_many(logits, 100, temperature=1.0, min_p=fraction)).tolist() == [0, 1]
    above = math.nextafter(fraction, 1)
    assert np.flatnonzero(draw_many(logits, 100, temperature=1.0, min_p=above)).tolist() == [0]


def test_min_p_compares_with_the_likeliest_even_where_top_p_has_cut() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    found = draw_many(logits, 300, temperature=1.0, top_p=0.8, min_p=0.6)
    assert np.flatnonzero(found).tolist() == [0, 1]


def test_the_penalty_weakens_seen_tokens_on_both_sides_of_zero() -> None:
    logits = np.array([4, 3, -1, -3], np.float32)
    seen = np.array([1, 0, 1, 0], np.uint8)
    greedy = SamplingOptions(repetition_penalty=2.0)
    assert sample_token(logits, greedy, row=0, step=0, seen=seen) == 1
    assert sample_token(logits, greedy, row=0, step=0) == 0, "nothing seen, nothing weakened"
    below = np.array([-1.0, -1.5], np.float32)
    assert sample_token(below, greedy, row=0, step=0, seen=np.array([1, 0], np.uint8)) == 1
    strengthened = SamplingOptions(repetition_penalty=0.5)
    assert sample_token(below, strengthened, row=0, step=0, seen=np.array([0, 1], np.uint8)) == 1


def test_the_penalty_comes_before_temperature_and_the_cuts() -> None:
    # Penalised, the first token falls behind the second and third, so top_k 2 drops it.
    logits = np.array([4, 3, 2.5, 0], np.float32)
    options = SamplingOptions(temperature=1.0, top_k=2, repetition_penalty=2.0)
    seen = np.array([1, 0, 0, 0], np.uint8)
    found = {sample_token(logits, options, row=0, step=step, seen=seen) for step in range(200)}
    assert found == {1, 2}


def test_a_penalty_that_makes_the_largest_logit_infinite_is_refused() -> None:
    options = SamplingOptions(repetition_penalty=1e-300)
    with pytest.raises(ContractError, match="not finite"):
        sample_token(np.array([3e38, 0], np.float32), options, row=0, step=0, seen=np.ones(2, np.uint8))


def test_choosing_changes_neither_logits_nor_marks() -> None:
    logits, seen = np.array([1, 2, 3], np.float32), np.array([0, 1, 1], np.uint8)
    sample_token(logits, SamplingOptions(temperature=1.0, repetition_penalty=1.5, top_k=2), row=0, step=0, seen=seen)
    assert (logits.tolist(), seen.tolist()) == ([1, 2, 3], [0, 1, 1])


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
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": "0.5"}, "top_p"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1, found -0.1"),
        ({"min_p": 1.01}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0, found 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed must be between 0 and 4294967295"),
        ({"seed": -1, "top_p": 2.0, "min_p": 2.0, "repetition_penalty": 0.0}, "4 problems"),
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
