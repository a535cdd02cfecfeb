"""Rows that evict: a model with an attention window goes on for ever in a cache that does not grow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from crt_export.errors import InputError
from crt_export.runtime import GenerationOptions

CAPACITY, WINDOW = 10, 6
ROOM = CAPACITY - (WINDOW - 1)
# An eviction rounds every key once more than a cache that never evicts.
CLOSE = {"rtol": 0, "atol": 5e-5}


def test_stepping_over_the_end_gives_the_logits_of_an_endless_cache(windowed: Any) -> None:
    tokens = windowed.ids(40)
    with torch.no_grad():
        decoded, _ = windowed.model.sequential(torch.tensor([tokens]))
        expected = windowed.model.head(decoded.hidden).float().numpy()[0]
    session = windowed.session(capacity=CAPACITY, on_full="evict")
    positions = []
    for index, token in enumerate(tokens):
        np.testing.assert_allclose(session.step([token])[0], expected[index], **CLOSE)
        positions.append(int(session.position[0]))
    assert max(positions) == CAPACITY
    assert positions[9:13] == [10, WINDOW, WINDOW + 1, WINDOW + 2]


def test_the_window_matters_so_its_test_can_fail(windowed: Any) -> None:
    """What the window no longer sees still acts through the recurrent state, what it sees acts directly."""
    first, second = windowed.ids(30), windowed.ids(30)
    second[25] = 40 if first[25] != 40 else 41
    logits = []
    for tokens in (first, second):
        session = windowed.session(capacity=CAPACITY, on_full="evict")
        for token in tokens:
            session.advance([token])
        logits.append(session.logits)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_prefill_over_the_end_is_cut_alike_however_full_the_row_is(windowed: Any) -> None:
    prompt = windowed.ids(28)
    parts = [prompt[begin : begin + ROOM] for begin in range(0, 28, ROOM)]
    expected = windowed.logits(parts, [])
    evicting = windowed.session(capacity=CAPACITY, on_full="evict")
    np.testing.assert_allclose(evicting.prefill([prompt])[0], expected, **CLOSE)
    roomy = windowed.session(capacity=64).prefill([prompt], chunk=ROOM)
    np.testing.assert_allclose(roomy[0], expected, rtol=0, atol=2e-5)
    with pytest.raises(InputError, match=f"chunk must be at least 1 and at most {ROOM}, found {ROOM + 1}"):
        evicting.prefill([prompt], chunk=ROOM + 1)


def test_rows_evict_on_their_own(windowed: Any) -> None:
    rows = [windowed.ids(9), windowed.ids(2, seed=1), windowed.ids(17, seed=2)]
    steps = windowed.ids(9, seed=3)
    batch = windowed.session(batch=3, capacity=CAPACITY, on_full="evict")
    together = [batch.prefill(rows), *(batch.step([token] * 3) for token in steps)]
    for row, prompt in enumerate(rows):
        alone = windowed.session(capacity=CAPACITY, on_full="evict")
        expected = [alone.prefill([prompt]), *(alone.step([token]) for token in steps)]
        for found, wanted in zip(together, expected, strict=True):
            np.testing.assert_allclose(found[row], wanted[0], rtol=0, atol=1e-5)
        assert batch.position[row] == alone.position[0]


def test_an_eviction_leaves_zeros_behind_the_row(windowed: Any) -> None:
    session = windowed.session(batch=2, capacity=CAPACITY, on_full="evict")
    session.prefill([windowed.ids(10), windowed.ids(3, seed=1)])
    session.step([40, 41])
    assert session.position.tolist() == [WINDOW, 4]
    for cache in windowed.caches(session):
        assert cache[0, :, :WINDOW].any(axis=(0, 2)).all()
        assert not cache[0, :, WINDOW:].any()
        assert not cache[1, :, 4:].any()


def test_a_generation_longer_than_the_cache(windowed: Any) -> None:
    prompt, options = windowed.ids(4), GenerationOptions(max_new_tokens=30, ignore_eos=True)
    evicting = windowed.session(capacity=CAPACITY, on_full="evict").generate([prompt], options)
    endless = windowed.session(capacity=64).generate([prompt], options)
    assert list(evicting) == list(endless)
    assert len(evicting.tokens[0]) == 30
    with pytest.raises(InputError, match="exceed the capacity"):
        windowed.session(capacity=CAPACITY).generate([prompt], options)


def test_a_snapshot_of_a_evicting_row_goes_on(windowed: Any) -> None:
    session = windowed.session(capacity=CAPACITY, on_full="evict")
    session.prefill([windowed.ids(23)])
    other = session.fork()
    np.testing.assert_array_equal(other.step([50]), session.step([50]))
    for token in windowed.ids(12, seed=1):
        np.testing.assert_array_equal(other.step([token]), session.step([token]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"on_full": "evict", "capacity": WINDOW - 1},
            f"capacity of at least {WINDOW}, the attention window of {WINDOW}; found 5",
        ),
        ({"on_full": "grow"}, "on_full must be 'error' or 'evict', found 'grow'"),
    ],
)
def test_impossible_evictions_are_refused(windowed: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        windowed.session(**options)


def test_a_model_without_window_cannot_evict(either: Any) -> None:
    with pytest.raises(InputError, match="needs a model with an attention window"):
        either.session(on_full="evict")


def test_slide_is_another_word_for_evict(windowed: Any) -> None:
    evicting, sliding = (windowed.session(capacity=WINDOW, on_full=word) for word in ("evict", "slide"))
    for token in windowed.ids(9):
        np.testing.assert_array_equal(evicting.step([token]), sliding.step([token]))


def test_a_capacity_of_the_window_is_enough(windowed: Any) -> None:
    tokens = windowed.ids(15)
    small = windowed.session(capacity=WINDOW, on_full="evict")
    large = windowed.session(capacity=64)
    for token in tokens:
        np.testing.assert_allclose(small.step([token]), large.step([token]), **CLOSE)
