"""The engine's own choice: what next_tokens says, and a greedy loop that copies nothing it need not."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from crt_export.errors import ContractError, InputError


def test_next_tokens_are_the_likeliest_after_each_rows_last_token(either: Any) -> None:
    session = either.session(batch=3)
    assert session.next_tokens.tolist() == [-1, -1, -1]
    logits = session.prefill([either.ids(5), [], either.ids(2, seed=1)])
    assert session.next_tokens.tolist() == [logits[0].argmax(), -1, logits[2].argmax()]
    kept = session.next_tokens[2]
    logits = session.step([40, 41, None])
    assert session.next_tokens.tolist() == [logits[0].argmax(), logits[1].argmax(), kept]
    session.next_tokens[:] = 0  # a copy
    assert session.next_tokens[0] == logits[0].argmax()
    session.reset()
    assert session.next_tokens.tolist() == [-1, -1, -1]


def test_advance_is_a_step_whose_logits_wait(either: Any) -> None:
    stepping, advancing = (either.session(batch=2) for _ in range(2))
    rows = [either.ids(4), either.ids(3, seed=1)]
    for each in (stepping, advancing):
        each.prefill(rows)
    advancing.advance([50, 51])
    advancing.advance([52, None])  # row 1 has logits that nobody has read yet
    stepping.step([50, 51])
    expected = stepping.step([52, None])
    np.testing.assert_array_equal(advancing.logits, expected)
    np.testing.assert_array_equal(advancing.logits, expected)
    assert advancing.position.tolist() == [6, 4]
    np.testing.assert_array_equal(advancing.step([53, 54]), stepping.step([53, 54]))


def test_unread_logits_are_part_of_a_snapshot(either: Any) -> None:
    session = either.session()
    session.prefill([either.ids(4)])
    session.advance([50])
    taken = session.snapshot()
    np.testing.assert_array_equal(taken.tensors["logits"], session.logits)


def test_logits_of_a_row_without_tokens_are_nan(either: Any) -> None:
    session = either.session(batch=2)
    assert np.isnan(session.logits).all()
    session.step([None, 40])
    assert np.isnan(session.logits[0]).all()
    assert np.isfinite(session.logits[1]).all()


def test_a_greedy_loop_uploads_nothing(either: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = either.session(batch=2)
    session.prefill([either.ids(4), either.ids(2, seed=1)])
    written: list[str] = []
    for side in session._guard.decoder.tensors._sides:
        for name in ("ids", "position"):
            buffer = getattr(side, name)
            write = buffer.write

            def counted(values: np.ndarray, name: str = name, write: Any = write) -> None:
                written.append(name)
                write(values)

            monkeypatch.setattr(buffer, "write", counted)
    chosen = [session.next_tokens.tolist()]
    for _ in range(5):
        session.advance(session.next_tokens)
        chosen.append(session.next_tokens.tolist())
    assert written == []
    session.advance([(token + 1) % 256 for token in chosen[-1]])
    assert written == ["ids"]

    again = either.session(batch=2)
    again.prefill([either.ids(4), either.ids(2, seed=1)])
    for before, after in itertools.pairwise(chosen):
        assert again.step(before).argmax(axis=1).tolist() == after


def test_rows_that_pause_do_not_confuse_what_the_engine_holds(either: Any) -> None:
    """The two sets of ids and positions go stale for a row that pauses for one step or two."""
    session = either.session(batch=2)
    session.prefill([either.ids(4), either.ids(2, seed=1)])
    fed: list[list[int]] = [[], []]
    for pause in (None, 0, 1, 1, None, 0, 0, None, 1, None):
        tokens = [None if row == pause else int(token) for row, token in enumerate(session.next_tokens)]
        for row, token in enumerate(tokens):
            fed[row] += [] if token is None else [token]
        logits = session.step(tokens)
    for row, prompt in enumerate((either.ids(4), either.ids(2, seed=1))):
        np.testing.assert_allclose(logits[row], either.logits([prompt], fed[row]), rtol=0, atol=2e-5)


def test_advance_over_a_value_that_is_not_finite_poisons(either: Any, overflowing_token: int) -> None:
    """At once where the state shows it, else when the logits are asked for."""
    session = either.session()
    session.prefill([either.ids(3)])

    def advance_and_read() -> None:
        session.advance([overflowing_token])
        assert session.logits.size

    with pytest.raises(ContractError, match="is not finite"):
        advance_and_read()
    with pytest.raises(InputError, match="earlier call of this session failed"):
        session.advance([60])
    session.reset()
    assert np.isfinite(session.prefill([either.ids(3)])).all()


def test_a_choice_outside_the_vocabulary_is_a_broken_engine(crt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = crt.session(batch=2)
    monkeypatch.setattr(session._guard.decoder.tensors, "next_tokens", lambda: [3, 256])
    with pytest.raises(ContractError, match="next_token is outside the vocabulary: row 1 has 256"):
        session.advance([40, 41])
    with pytest.raises(InputError, match="earlier call"):
        session.step([40, 41])


def test_what_is_fed_is_history(crt: Any) -> None:
    session = crt.session(batch=2)
    session.prefill([[40, 41], []])
    session.step([None, 42])
    session.advance([43, None])
    seen = [np.flatnonzero(row).tolist() for row in session.history.seen]
    assert seen == [[40, 41, 43], [42]]
    session.history.draw(0, 44, keep=True)
    session.step([45, None])
    assert session.history.pending.tolist() == [-1, -1]
    session.reset()
    assert not session.history.seen.any()
    assert session.history.drawn.tolist() == [0, 0]


def test_the_tokenizer_is_the_bundles(crt: Any) -> None:
    assert crt.session().tokenizer is crt.bundle.tokenizer
