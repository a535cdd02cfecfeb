"""A session gives what PyTorch gives, whoever shares its batch, and refuses what it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from crt_export.errors import ContractError, InputError
from crt_export.runtime import GenerationOptions, Session

TARGET = "ort-cpu-fp32"
CLOSE = {"rtol": 0, "atol": 2e-5}
# A row's company decides how its matrix products are blocked, hence the last bits of its sums.
COMPANY = {"rtol": 0, "atol": 1e-5}


def ids(count: int, seed: int = 0) -> list[int]:
    """Ids above the special ones of the fixtures."""
    return np.random.default_rng(seed).integers(32, 256, count).tolist()


def test_prefill_and_steps_give_the_logits_of_pytorch(either: Any) -> None:
    session = either.bundle.session(TARGET)
    prompt, more = ids(9), ids(4, seed=1)
    np.testing.assert_allclose(session.prefill([prompt])[0], either.logits([prompt], []), **CLOSE)
    for index, token in enumerate(more):
        expected = either.logits([prompt], more[: index + 1])
        np.testing.assert_allclose(session.step([token])[0], expected, **CLOSE)
    assert session.position.tolist() == [13]


def test_steps_alone_give_the_sequential_recurrence(either: Any) -> None:
    session = either.bundle.session(TARGET)
    tokens = ids(6)
    with torch.no_grad():
        decoded, _ = either.model.sequential(torch.tensor([tokens]))
        expected = either.model.head(decoded.hidden).float().numpy()[0]
    for index, token in enumerate(tokens):
        np.testing.assert_allclose(session.step([token])[0], expected[index], **CLOSE)


def test_prefill_continues_an_earlier_prefill_and_step(either: Any) -> None:
    session = either.bundle.session(TARGET)
    first, second = ids(5), ids(7, seed=1)
    session.prefill([first])
    np.testing.assert_allclose(session.prefill([second])[0], either.logits([first, second], []), **CLOSE)
    session.reset()
    session.prefill([first])
    session.step([50])
    # A chunk of one token is a step: K passes over it change nothing after the first.
    np.testing.assert_allclose(session.prefill([second])[0], either.logits([first, [50], second], []), **CLOSE)


def test_rows_of_unequal_length_agree_with_each_row_alone(either: Any) -> None:
    rows = [ids(9), ids(1, seed=1), ids(5, seed=2)]
    batch = either.bundle.session(TARGET, batch=3)
    together = [batch.prefill(rows), batch.step([40, 41, 42]), batch.prefill([[60, 61], [62] * 4, [63]])]
    for row, prompt in enumerate(rows):
        alone = either.bundle.session(TARGET)
        expected = [
            alone.prefill([prompt]),
            alone.step([40 + row]),
            alone.prefill([[[60, 61], [62] * 4, [63]][row]]),
        ]
        for found, wanted in zip(together, expected, strict=True):
            np.testing.assert_allclose(found[row], wanted[0], **COMPANY)
    assert batch.position.tolist() == [12, 6, 7]


def test_an_empty_row_keeps_its_logits_its_position_and_its_future(either: Any) -> None:
    session, twin = (either.bundle.session(TARGET, batch=3) for _ in range(2))
    rows = [ids(3), ids(4, seed=1), ids(2, seed=2)]
    before = session.prefill(rows)
    twin.prefill(rows)
    during = session.prefill([[80, 81], [], [82]])
    np.testing.assert_array_equal(during[1], before[1])
    assert session.position.tolist() == [5, 4, 3]
    np.testing.assert_allclose(session.step([None, 90, None])[1], twin.step([91, 90, 92])[1], **COMPANY)


def test_a_stopped_row_is_frozen_to_the_bit(either: Any) -> None:
    """Other rows step and prefill: nothing of the stopped one is written, its state included."""
    session = either.bundle.session(TARGET, batch=3)
    session.prefill([ids(3), ids(4, seed=1), ids(2, seed=2)])
    before = session.snapshot().tensors
    for _ in range(3):
        session.step([50, None, 51])
    session.prefill([ids(5), [], ids(7)])
    session.step([52, None, None])
    after = session.snapshot().tensors
    for name in before:
        if name.startswith("past_key_values."):
            np.testing.assert_array_equal(after[name][1, :, :4], before[name][1, :, :4])
            assert not after[name][1, :, 4:].any()
        else:
            np.testing.assert_array_equal(after[name][1], before[name][1])
    assert session.position.tolist() == [12, 4, 12]


def test_a_row_without_any_token_has_no_logits(crt: Any) -> None:
    logits = crt.bundle.session(TARGET, batch=2).prefill([ids(3), []])
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()


def test_padding_never_passes_the_capacity_and_leaves_nothing_behind(either: Any) -> None:
    session = either.bundle.session(TARGET, batch=3, capacity=8)
    rows = [ids(7), ids(1, seed=1), ids(2, seed=2)]
    session.prefill(rows)
    more = [[100], ids(6, seed=3), ids(6, seed=4)]  # padding row 0 to six would need 13 of 8
    found = session.prefill(more)
    assert session.position.tolist() == [8, 7, 8]
    for row, prompt in enumerate(rows):
        alone = either.bundle.session(TARGET, capacity=8)
        alone.prefill([prompt])
        np.testing.assert_allclose(found[row], alone.prefill([more[row]])[0], **COMPANY)
    for cache in either.caches(session):
        assert not cache[1, :, 7:].any()
        assert cache[1, :, :7].any(axis=(0, 2)).all()


def test_chunks_of_a_row_depend_on_its_own_tokens_only(either: Any) -> None:
    prompt, short = ids(10), ids(3, seed=1)
    batch = either.bundle.session("chunked", batch=2)
    together = batch.prefill([prompt, short])
    alone = either.bundle.session("chunked").prefill([prompt])
    np.testing.assert_allclose(together[0], alone[0], **COMPANY)
    parts = [prompt[:4], prompt[4:8], prompt[8:]]
    np.testing.assert_allclose(together[0], either.logits(parts, []), **CLOSE)
    np.testing.assert_allclose(together[1], either.logits([short], []), **CLOSE)


def test_chunking_matters_so_the_chunk_test_can_fail(crt: Any) -> None:
    prompt = ids(10)
    whole, chunked = (crt.bundle.session(name).prefill([prompt]) for name in (TARGET, "chunked"))
    assert np.abs(whole - chunked).max() > 1e-4


def test_the_cache_can_be_filled_to_the_last_token_and_no_further(either: Any) -> None:
    session = either.bundle.session(TARGET, capacity=6)
    session.prefill([ids(5)])
    full = session.step([70])
    for call in (lambda: session.step([71]), lambda: session.prefill([[71]])):
        with pytest.raises(InputError, match=r"row 0: 6 tokens in the cache and 1 more exceed the capacity of 6"):
            call()
    assert session.position.tolist() == [6]
    np.testing.assert_allclose(full[0], either.logits([ids(5)], [70]), **CLOSE)


Call = Callable[[Session], object]
A_DICT: Any = {"max_new_tokens": 3}
TEXT: Any = "x"
REFUSED: list[tuple[str, Call, str]] = [
    ("no row has tokens", lambda s: s.prefill([[], []]), "empty prompt"),
    ("one row of two", lambda s: s.prefill([[40]]), "batch is 2, found 1 rows"),
    ("three rows of two", lambda s: s.prefill([[40], [41], [42]]), "batch is 2, found 3 rows"),
    ("rows are numbers", lambda s: s.prefill([40, 41]), "row 0: expected a flat list of token ids, found a single"),  # type: ignore[list-item]
    ("rows are a number", lambda s: s.prefill(40), "expected 2 rows of token ids"),  # type: ignore[arg-type]
    ("text", lambda s: s.prefill(["ab", "cd"]), "encode it with bundle.tokenizer"),  # type: ignore[list-item]
    ("nested", lambda s: s.prefill([[[40]], [41]]), r"found shape \[1, 1\]"),  # type: ignore[list-item]
    ("ragged", lambda s: s.prefill([[40, [41]], [41]]), "row 0: expected a flat list"),  # type: ignore[list-item]
    ("id too large", lambda s: s.prefill([[40], [41, 256]]), "row 1: token id 256 at index 1 is outside"),
    ("id negative", lambda s: s.prefill([[-1], [41]]), "row 0: token id -1"),
    ("id beyond int64", lambda s: s.prefill([[2**70], [41]]), "row 0"),
    ("fractions", lambda s: s.prefill([[0.5], [41]]), "row 0: expected integers"),  # type: ignore[list-item]
    ("true among ids", lambda s: s.prefill([[40], [1, True]]), "row 1: expected integers, found True or False"),
    ("false of numpy", lambda s: s.prefill([(1, np.False_), [41]]), "row 0: expected integers"),  # type: ignore[list-item]
    ("generate: true", lambda s: s.generate([[40, True], [41]]), "row 0: expected integers"),
    ("chunk is an array", lambda s: s.prefill([[40], [41]], chunk=np.array([1, 2])), "chunk must be a whole number"),  # type: ignore[arg-type]
    ("passes is an array", lambda s: s.prefill([[40], [41]], passes=np.array([1, 2])), "passes must be a whole"),  # type: ignore[arg-type]
    ("options are a dict", lambda s: s.generate([[1], [1]], A_DICT), "options must be GenerationOptions"),
    ("callback is text", lambda s: s.generate(None, GenerationOptions(max_new_tokens=2), on_token=TEXT), "on_token"),
    ("both rows wrong", lambda s: s.prefill([[-1], [999]]), "2 problems"),
    ("too long", lambda s: s.prefill([[40] * 62, [41]]), "row 0: 3 tokens in the cache and 62 more"),
    ("step: one of two", lambda s: s.step([40]), "batch is 2, found 1"),
    ("step: number", lambda s: s.step(40), "expected one token id per row"),  # type: ignore[arg-type]
    ("step: id too large", lambda s: s.step([40, 256]), "row 1: token id 256"),
    ("step: fraction", lambda s: s.step([40, 41.0]), "row 1: expected an integer, found 41.0"),  # type: ignore[list-item]
    ("step: list", lambda s: s.step([40, [41]]), r"row 1: expected an integer, found \[41\]"),  # type: ignore[list-item]
    ("step: true", lambda s: s.step([True, 41]), "row 0: expected an integer, found True"),
    ("step: no token", lambda s: s.step([None, None]), "at least one row"),
    ("generate: too long", lambda s: s.generate([[40], [41]]), "prompt and new tokens exceed the capacity"),
]


@pytest.mark.parametrize(("call", "message"), [entry[1:] for entry in REFUSED], ids=[e[0] for e in REFUSED])
def test_a_refused_call_changes_nothing(crt: Any, call: Call, message: str) -> None:
    session, twin = (crt.bundle.session(TARGET, batch=2) for _ in range(2))
    for each in (session, twin):
        each.prefill([ids(3), ids(3, seed=1)])
    with pytest.raises(InputError, match=message):
        call(session)
    assert session.position.tolist() == [3, 3]
    np.testing.assert_array_equal(session.step([50, 51]), twin.step([50, 51]))


@pytest.mark.parametrize("call", ["prefill", "step"])
def test_a_value_that_is_not_finite_poisons_until_reset(either: Any, overflowing_token: int, call: str) -> None:
    session = either.bundle.session(TARGET, batch=2)
    rows = [ids(3), ids(5, seed=1)]
    fresh = session.prefill(rows)
    failing = {
        "step": lambda: session.step([60, overflowing_token]),
        "prefill": lambda: session.prefill([[60], [61, overflowing_token]]),
    }
    with pytest.raises(ContractError, match=r"ort-cpu-fp32: \w+ is not finite: row 1 after position [56]"):
        failing[call]()
    assert session.position.tolist() == [3, 5]
    for cache in either.caches(session):
        assert not cache[0, :, 3:].any()
        assert not cache[1, :, 5:].any()
    for refused in (lambda: session.step([60, 61]), lambda: session.prefill([[60], [61]])):
        with pytest.raises(InputError, match=r"earlier call of this session failed .* call reset\(\) or restore\(\)"):
            refused()
    session.reset()
    assert session.position.tolist() == [0, 0]
    np.testing.assert_array_equal(session.prefill(rows), fresh)


def test_padding_is_not_checked_but_real_tokens_before_it_are(crt: Any, overflowing_token: int) -> None:
    session = crt.bundle.session(TARGET, batch=2)
    with pytest.raises(ContractError, match=r"residual is not finite: row 0 after position 0"):
        session.prefill([[overflowing_token], ids(6)])


def test_an_interrupt_in_the_middle_poisons_too(crt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = crt.bundle.session(TARGET)
    session.prefill([ids(3)])
    run = session._guard.decoder.tensors.step

    def interrupted(*arguments: Any) -> None:
        run(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(session._guard.decoder.tensors, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.step([60])
    assert all(not cache[0, :, 3:].any() for cache in crt.caches(session))
    with pytest.raises(InputError, match="KeyboardInterrupt"):
        session.step([60])


def test_reset_makes_a_session_new(either: Any) -> None:
    session = either.bundle.session(TARGET)
    first = session.prefill([ids(6)])
    session.step([90])
    session.reset()
    assert all(not cache.any() for cache in either.caches(session))
    np.testing.assert_array_equal(session.prefill([ids(6)]), first)


def test_logits_are_copies_and_float32(crt: Any) -> None:
    session = crt.bundle.session(TARGET)
    first = session.prefill([ids(3)])
    kept = first.copy()
    second = session.step([60])
    np.testing.assert_array_equal(first, kept)
    second[:] = 0
    assert session.prefill([[61]]).any()
    assert (first.dtype, first.shape) == (np.float32, (1, 256))
    session.position[:] = 99
    assert session.position.tolist() == [5]


def test_caches_are_updated_in_place_and_the_state_never_is(crt: Any) -> None:
    session = crt.bundle.session(TARGET)
    session.prefill([ids(3)])
    tensors = session._guard.decoder.tensors
    caches = crt.cache_buffers(session)
    addresses = [cache.address for cache in caches]
    for token in ids(12, seed=1):
        session.step([token])
    assert crt.cache_buffers(session) == caches
    assert [cache.address for cache in caches] == addresses
    assert all(cache[0, :, :15].any(axis=(0, 2)).all() for cache in crt.caches(session))
    # One launch per role of the two sets, bound once and used again for every step.
    assert len(tensors._step_launches) == 2
    first, second = (side.states["state"].address for side in tensors._sides)
    assert abs(first - second) >= 32 * 4


def test_every_slice_of_a_batch_can_step_again_and_again(plain: Any) -> None:
    session = plain.bundle.session(TARGET, batch=12)
    session.prefill([[40 + row] for row in range(12)])
    for first in range(12):
        for last in range(first, 12):
            session.reset()
            session.step([50 if first <= row <= last else None for row in range(12)])
            assert session.position.sum() == last - first + 1
    assert len(session._guard.decoder.tensors._step_launches) <= 64


def test_closed_sessions_are_refused_and_closing_twice_is_harmless(crt: Any) -> None:
    with crt.bundle.session(TARGET) as session:
        session.prefill([[40]])
    session.close()
    calls: list[Callable[[], object]] = [
        lambda: session.prefill([[40]]),
        lambda: session.step([40]),
        lambda: session.generate([[40]]),
        session.reset,
    ]
    for call in calls:
        with pytest.raises(InputError, match="this session is closed"):
            call()
