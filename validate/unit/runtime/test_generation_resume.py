"""A generation can be left and taken up again: same tokens, same random numbers, same penalty."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crt_export.errors import InputError, UnsupportedError
from crt_export.runtime import GenerationOptions, SamplingOptions, sample_token

TARGET = "ort-cpu-fp32"
PROMPTS = [[72, 101, 108, 108], [90, 91]]
WAYS = {
    "greedy": SamplingOptions(),
    "penalised": SamplingOptions(repetition_penalty=1.3),
    "sampled": SamplingOptions(temperature=1.5, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=4),
}


def going_on(count: int, sampling: SamplingOptions) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=count, sampling=sampling, ignore_eos=True)


@pytest.fixture(params=WAYS)
def sampling(request: pytest.FixtureRequest) -> SamplingOptions:
    return WAYS[request.param]


def test_going_on_is_the_unbroken_generation(either: Any, sampling: SamplingOptions) -> None:
    with either.bundle.session(TARGET, batch=2) as session, either.bundle.session(TARGET, batch=2) as broken:
        whole = session.generate(PROMPTS, going_on(9, sampling))
        list(whole)
        found: list[list[int]] = [[], []]
        for prompts, count in ((PROMPTS, 4), (None, 1), ([[], []], 4)):
            part = broken.generate(prompts, going_on(count, sampling))
            list(part)
            found = [before + new for before, new in zip(found, part.tokens, strict=True)]
        assert found == whole.tokens
        assert broken.position.tolist() == session.position.tolist()
        assert broken.history.drawn.tolist() == [9, 9]
        np.testing.assert_array_equal(broken.logits, session.logits)


def test_a_snapshot_in_the_middle_goes_on_in_another_session(either: Any, sampling: SamplingOptions) -> None:
    with either.bundle.session(TARGET, batch=2) as session, either.bundle.session(TARGET, batch=2) as other:
        generation = session.generate(PROMPTS, going_on(8, sampling))
        before = [next(generation) for _ in range(3)]
        snapshot = session.snapshot()
        after = list(generation)
        other.restore(snapshot)
        resumed = other.generate(None, going_on(5, sampling))
        assert list(resumed) == after
        assert [a + b for a, b in zip(map(list, zip(*before, strict=True)), resumed.tokens, strict=True)] == (
            generation.tokens
        )
        np.testing.assert_array_equal(other.logits, session.logits)


def test_a_second_generation_draws_other_random_numbers(crt: Any) -> None:
    """Every token stops, so each generation draws from the same logits and only the number differs."""
    sampling = SamplingOptions(temperature=3.0, seed=1)
    with crt.bundle.session(TARGET) as session:
        everything = tuple(range(session.vocab_size))
        options = GenerationOptions(max_new_tokens=4, sampling=sampling, stop_token_ids=everything)
        logits = session.prefill([PROMPTS[0]])[0]
        found = []
        for _ in range(8):
            generation = session.generate(None, options)
            assert list(generation) == []
            found.append(generation.stopped_by[0])
        assert session.history.drawn.tolist() == [8]
        assert session.position.tolist() == [len(PROMPTS[0])], "a stop token is never fed"
    assert found == [sample_token(logits, sampling, row=0, step=step) for step in range(8)]
    assert len(set(found)) > 4


def test_the_penalty_knows_the_prompt_and_what_was_drawn(crt: Any) -> None:
    sampling = SamplingOptions(repetition_penalty=1e6)
    with crt.bundle.session(TARGET, capacity=40) as session:
        prompt = [1, 2, 3, 4]
        generation = session.generate([prompt], going_on(30, sampling))
        list(generation)
        seen = [*prompt, *generation.tokens[0]]
        # Every seen token has all but lost its positive logit, and some unseen one is positive.
        assert len(set(seen)) == len(seen)
        assert np.flatnonzero(session.history.seen[0]).tolist() == sorted(seen)


def test_going_on_after_a_prefill_by_hand(crt: Any) -> None:
    options = going_on(5, WAYS["sampled"])
    with crt.bundle.session(TARGET) as session, crt.bundle.session(TARGET) as other:
        expected = session.generate([PROMPTS[0]], options)
        list(expected)
        other.prefill([PROMPTS[0]])
        found = other.generate(None, options)
        list(found)
        assert found.tokens == expected.tokens
        assert found.prompt_tokens == [0]


def test_a_prompt_follows_the_pending_token(crt: Any) -> None:
    """A conversation: the last token of the answer is fed before the next question."""
    with crt.bundle.session(TARGET) as session, crt.bundle.session(TARGET) as by_hand:
        first = session.generate([PROMPTS[0]], going_on(3, SamplingOptions()))
        list(first)
        second = session.generate([[60, 61]], going_on(1, SamplingOptions()))
        list(second)
        by_hand.prefill([PROMPTS[0]])
        for token in first.tokens[0][:2]:
            by_hand.step([token])
        by_hand.prefill([[first.tokens[0][2], 60, 61]])
        np.testing.assert_array_equal(session.logits, by_hand.logits)
        assert second.prompt_tokens == [2]


def test_a_token_fed_by_hand_takes_the_place_of_the_pending_one(crt: Any) -> None:
    with crt.bundle.session(TARGET) as session:
        list(session.generate([PROMPTS[0]], going_on(2, SamplingOptions())))
        assert session.history.pending[0] >= 0
        logits = session.step([5])
        going = session.generate(None, going_on(1, SamplingOptions()))
        assert next(going) == [int(np.argmax(logits[0]))]
        assert session.position.tolist() == [len(PROMPTS[0]) + 2]


def test_a_row_that_holds_nothing_needs_a_prompt(crt: Any) -> None:
    with crt.bundle.session(TARGET, batch=2) as session:
        session.prefill([[1], []])
        with pytest.raises(InputError, match="row 1"):
            session.generate([[], []])
        with pytest.raises(InputError, match="row 1"):
            session.generate()
        assert len(list(session.generate([[], [2]], going_on(2, SamplingOptions())))) == 2


def test_a_session_that_was_reset_under_a_generation_is_refused(crt: Any) -> None:
    with crt.bundle.session(TARGET) as session:
        generation = session.generate([PROMPTS[0]], going_on(4, SamplingOptions()))
        next(generation)
        session.reset()
        with pytest.raises(InputError, match="row 0 holds no token"):
            next(generation)


def test_passes_are_those_of_the_prefill(crt: Any) -> None:
    """One pass over the prompt is less than the unrolled graph does: other logits, those of a prefill by hand."""
    with crt.bundle.session(TARGET) as session, crt.bundle.session(TARGET) as by_hand:
        generation = session.generate(
            [PROMPTS[0]], GenerationOptions(max_new_tokens=4, sampling=SamplingOptions(), passes=1)
        )
        next(generation)
        np.testing.assert_array_equal(session.logits, by_hand.prefill([PROMPTS[0]], passes=1))
        by_hand.reset()
        assert not np.array_equal(session.logits, by_hand.prefill([PROMPTS[0]]))


def test_passes_of_a_plain_transformer_are_refused(plain: Any) -> None:
    with plain.bundle.session(TARGET) as session, pytest.raises(UnsupportedError, match="passes"):
        session.generate([PROMPTS[0]], GenerationOptions(max_new_tokens=4, passes=2))
