"""What a session holds can be taken out, put back, copied, and is refused where it does not belong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.bundle.manifest import sealed
from crt_export.errors import BundleError, ContractError, InputError
from crt_export.runtime import Bundle, Session, load_bundle
from crt_export.runtime.snapshot import Snapshot

Tensors = dict[str, Any]


def started(runnable: Any, **options: Any) -> Session:
    """A session of three rows of 5, 0 and 3 tokens, with a history."""
    session = runnable.session(batch=3, **options)
    session.prefill([runnable.ids(4), [], runnable.ids(2, seed=1)])
    session.step([50, None, 51])
    session.history.draw(0, 60, keep=True)
    session.history.held[0] = 1
    return session


def go_on(session: Session) -> list[np.ndarray]:
    """Everything a session says about its rows, before and after more tokens."""
    history = session.history
    found = [*history.tensors().values(), session.position, session.next_tokens, session.logits]
    found = [values.copy() for values in found]
    found += [session.step([None, 70, 71]), session.prefill([[72, 73], [74], []]), session.step([75, 76, 77])]
    return found


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_restored_session_goes_on_to_the_bit(either: Any) -> None:
    session = started(either)
    taken = session.snapshot()
    expected = go_on(session)
    session.restore(taken)
    assert_same(go_on(session), expected)
    another = either.session(batch=3)
    another.prefill([either.ids(7, seed=5)] * 3)  # of which nothing may be left
    another.restore(taken)
    assert_same(go_on(another), expected)


def test_a_file_brings_it_all_back(either: Any, tmp_path: Path) -> None:
    session = started(either)
    session.snapshot().save(tmp_path / "talk.snapshot")
    expected = go_on(session)
    other = either.session(batch=3)
    other.restore(Snapshot.load(tmp_path / "talk.snapshot"))
    assert_same(go_on(other), expected)


def test_another_capacity_takes_it_if_the_tokens_fit(either: Any) -> None:
    taken = started(either).snapshot()
    expected = go_on(started(either))
    for capacity in (9, 64):
        other = either.session(batch=3, capacity=capacity)
        other.restore(taken)
        for found, wanted in zip(go_on(other), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    tight = either.session(batch=3, capacity=4)
    with pytest.raises(BundleError, match="row 0 holds 5 tokens, this session has a capacity of 4"):
        tight.restore(taken)
    assert tight.position.tolist() == [0, 0, 0]


def test_an_empty_session_has_a_snapshot_too(either: Any, tmp_path: Path) -> None:
    either.session(batch=2).snapshot().save(tmp_path / "empty")
    session = either.session(batch=2)
    fresh = session.prefill([[40, 41], [42]])
    session.restore(Snapshot.load(tmp_path / "empty"))
    assert session.position.tolist() == [0, 0]
    assert np.isnan(session.logits).all()
    np.testing.assert_array_equal(session.prefill([[40, 41], [42]]), fresh)


def test_a_snapshot_is_a_copy(crt: Any) -> None:
    session = started(crt)
    taken = session.snapshot()
    before = {name: values.copy() for name, values in taken.tensors.items()}
    expected = go_on(session)
    for name, values in taken.tensors.items():
        np.testing.assert_array_equal(values, before[name])
    session.restore(taken)
    for values in taken.tensors.values():
        values[...] = 0
    assert_same(go_on(session), expected)


def test_forks_go_on_independently(either: Any) -> None:
    session = started(either, capacity=16)
    fork = session.fork()
    assert (fork.target, fork.batch, fork.capacity) == (session.target, session.batch, session.capacity)
    twin = started(either, capacity=16)
    fork.step([90, 91, 92])
    fork.history.draw(2, 99, keep=True)
    fork.reset()
    assert_same(go_on(session), go_on(twin))


def test_a_fork_belongs_to_the_bundle(crt: Any, open_engine: Any) -> None:
    with Bundle(crt.bundle.files, open_engine) as bundle:
        session = bundle.session("ort-cpu-fp32")
        session.prefill([[40]])
        fork = session.fork()
    with pytest.raises(InputError, match="this session is closed"):
        fork.step([41])


@pytest.mark.parametrize("lift", ["restore", "reset"])
def test_restore_lifts_a_poisoning_as_reset_does(either: Any, overflowing_token: int, lift: str) -> None:
    session = started(either)
    taken = session.snapshot()
    expected = go_on(session)
    with pytest.raises(ContractError):
        session.prefill([[60, overflowing_token], [61], []])
    for refused in (session.snapshot, session.fork, lambda: session.logits, lambda: session.generate()):
        with pytest.raises(InputError, match=r"call reset\(\) or restore\(\)"):
            refused()
    if lift == "restore":
        session.restore(taken)
    else:
        session.reset()
        assert session.history.pending.tolist() == [-1, -1, -1]
        session.restore(taken)
    assert_same(go_on(session), expected)


def changed(snapshot: Snapshot, change: Callable[[Tensors], object]) -> Snapshot:
    tensors = {name: values.copy() for name, values in snapshot.tensors.items()}
    change(tensors)
    return dataclasses.replace(snapshot, tensors=tensors)


def put(name: str, index: Any, value: Any) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].__setitem__(index, value)


KEY = "past_key_values.0.key"
WRONG: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop("pending"), "pending is missing"),
    "missing cache": (lambda t: t.pop(KEY), f"{KEY} is missing"),
    "missing position": (lambda t: t.pop("position"), r"position must be int64 \[batch\]"),
    "extra": (lambda t: t.update(more=np.zeros(1)), "more is unknown"),
    "two problems": (lambda t: (t.pop("drawn"), t.update(more=np.zeros(1))), "2 problems"),
    "dtype": (lambda t: t.update({KEY: t[KEY].astype(np.float16)}), rf"{KEY} must be float32 .* found float16"),
    "length": (lambda t: t.update({KEY: t[KEY][:, :, 1:]}), rf"{KEY} must be .*, found float32 \[3, 4, 4, 8\]"),
    "no array": (lambda t: t.update(seen=[1]), "seen must be an array, found list"),
    "scalar position": (lambda t: t.update(position=np.int64(3)), "position must be int64"),
    "batch": (lambda t: t.update(position=np.zeros(2, np.int64)), "it holds 2 rows, this session has a batch of 3"),
    "negative position": (put("position", 1, -1), "row 1 holds -1 tokens"),
    "far position": (put("position", 0, 2**40), f"row 0 holds {2**40} tokens"),
    "NaN in a cache": (put(KEY, (0, 1, 4, 2), np.nan), f"row 0: {KEY} is not finite"),
    "infinite logits": (put("logits", (2, 7), np.inf), "row 2: logits is not finite"),
    "pending": (put("pending", 0, 256), "row 0: the pending token 256 is outside the vocabulary"),
    "next token": (put("next_tokens", 0, -1), "row 0: the next token -1 is outside the vocabulary"),
    "draws": (put("drawn", 1, -5), "row 1: -5 random draws"),
    "draws that would overflow": (
        put("drawn", 1, 2**62 + 1),
        f"row 1: {2**62 + 1} random draws, must be 0 to {2**62}",
    ),
    "seen": (put("seen", (2, 3), 2), "row 2: seen must be 0 or 1"),
    "recent": (put("recent", (1, 9), 256), "row 1: a recent token is outside the vocabulary"),
    "recent below none": (put("recent", (1, 9), -2), "row 1: a recent token is outside the vocabulary"),
    "few recent": (lambda t: t.update(recent=t["recent"][:, 1:]), r"recent must be int64 \[3, 1024\]"),
    "held": (put("held", 2, -1), "row 2: -1 characters held back"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_snapshot_that_no_session_gave_is_refused_and_changes_nothing(
    plain: Any, change: Callable[[Tensors], object], message: str
) -> None:
    session, twin = started(plain), started(plain)
    with pytest.raises(BundleError, match=message):
        session.restore(changed(session.snapshot(), change))
    assert_same(go_on(session), go_on(twin))


def test_a_state_that_is_not_finite_is_refused(crt: Any) -> None:
    session = started(crt)
    with pytest.raises(BundleError, match="row 2: state is not finite"):
        session.restore(changed(session.snapshot(), put("state", (2, 0, 0), np.inf)))


def test_what_lies_beyond_a_rows_tokens_is_not_restored(either: Any) -> None:
    """Row 2 has 3 tokens in caches of 5: a NaN behind them would spoil its logits in spite of the mask."""
    session = started(either)
    expected = go_on(started(either))
    spoilt = changed(session.snapshot(), put(KEY, (2, slice(None), slice(3, None)), np.nan))
    for name in ("state", "logits"):
        if name in spoilt.tensors:
            spoilt.tensors[name][1] = np.nan  # a row without tokens
    session.restore(spoilt)
    assert_same(go_on(session), expected)


def test_other_targets_and_batches_are_refused(crt: Any) -> None:
    taken = started(crt).snapshot()
    with pytest.raises(BundleError, match="it was taken on target 'ort-cpu-fp32', this session runs on 'chunked'"):
        crt.session(target="chunked", batch=3).restore(taken)
    with pytest.raises(BundleError, match="it holds 3 rows, this session has a batch of 1"):
        crt.session().restore(taken)


def test_another_bundle_is_refused_even_with_the_same_graphs(crt: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(crt.bundle.files.path, tmp_path / "copy"))
    with load_bundle(folder, allow_unvalidated=True) as copy:
        taken = copy.session("ort-cpu-fp32").snapshot()
    crt.session().restore(taken)  # a copy is the same bundle
    path = folder / "manifest.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "options": {"rebuilt": True}})))
    with load_bundle(folder, allow_unvalidated=True) as rebuilt:
        assert rebuilt.files.identity != crt.bundle.files.identity
        with pytest.raises(BundleError, match=rf"taken with the bundle {crt.bundle.files.identity[:16]}, this one is"):
            rebuilt.session("ort-cpu-fp32").restore(taken)


@pytest.mark.parametrize("other", [None, {"bundle": "b", "target": "t", "tensors": {}}], ids=["None", "dict"])
def test_what_is_no_snapshot_is_refused_and_changes_nothing(crt: Any, other: Any) -> None:
    session = started(crt)
    position = session.position
    with pytest.raises(BundleError, match=r"expected a snapshot of session\.snapshot\(\)"):
        session.restore(other)
    np.testing.assert_array_equal(session.position, position)
