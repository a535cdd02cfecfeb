"""Caches that grow with their rows, and the one graph that makes steps and prefill."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crt_export.engine.onnxruntime import load_graph
from crt_export.errors import ContractError
from crt_export.runtime import Session, caches
from crt_export.runtime.opening import Target

TARGET = "ort-cpu-fp32"
BLOCK = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of these tests have 64 positions, so their caches grow by 8 tokens."""
    monkeypatch.setattr(caches, "BLOCK", BLOCK)


@pytest.fixture(params=["rows share calls", "each row alone"])
def rows_are_independent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As an FP32 and as a target with INT8 weights runs the rows of a batch."""
    joins = request.param == "rows share calls"
    monkeypatch.setattr(Target, "rows_are_independent", joins)
    return joins


def lengths(model: Any, session: Session) -> set[int]:
    return {buffer.shape[2] for buffer in model.cache_buffers(session)}


def grows(model: Any, session: Session) -> bool:
    return session._guard.decoder.tensors._engine.host_memory


def talk(model: Any, session: Session, row: int, mate: list[int], tokens: int) -> list[np.ndarray]:
    """Logits of one of two rows that step together; its mate was fed something before."""
    for fed, prompt in ((row, model.ids(3, seed=7)), (1 - row, mate)):
        session.prefill([prompt if index == fed else [] for index in range(2)])
    return [session.step([token, token])[row] for token in model.ids(tokens, seed=8)]


@pytest.mark.parametrize("row", [0, 1])
def test_what_a_row_computes_does_not_depend_on_the_length_of_its_mate(
    either: Any, row: int, rows_are_independent: bool
) -> None:
    results = []
    for mate in (either.ids(3, seed=1), either.ids(30, seed=2), either.ids(43, seed=3)):
        session = either.session(batch=2, capacity=64)
        results.append(talk(either, session, row, mate, 18))
        if grows(either, session):
            longest = -(-(len(mate) + 18) // BLOCK) * BLOCK
            assert lengths(either, session) == {longest} if rows_are_independent else {24, longest}
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_rows_with_caches_of_their_own_compute_what_each_computes_alone(
    crt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "rows_are_independent", False)
    prompts = [crt.ids(3), crt.ids(21, seed=1), [], crt.ids(9, seed=2)]
    together = crt.session(batch=4, capacity=64)
    found = together.prefill(prompts)
    more = together.step([50, None, 51, 52])
    for row, (prompt, token) in enumerate(zip(prompts, [50, None, 51, 52], strict=True)):
        alone = crt.session(capacity=64)
        if prompt:
            np.testing.assert_array_equal(alone.prefill([prompt])[0], found[row])
        if token is not None:
            np.testing.assert_array_equal(alone.step([token])[0], more[row])


def test_growing_changes_nothing(either: Any, rows_are_independent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    del rows_are_independent
    tokens = either.ids(40)
    growing = either.session(capacity=60)
    found = [growing.prefill([tokens[:5]]), *(growing.step([token]) for token in tokens[5:])]
    if grows(either, growing):
        assert lengths(either, growing) == {40}
    monkeypatch.setattr(caches, "BLOCK", 64)
    whole = either.session(capacity=60)
    assert lengths(either, whole) == {60}
    wanted = [whole.prefill([tokens[:5]]), *(whole.step([token]) for token in tokens[5:])]
    np.testing.assert_array_equal(found, wanted)
    for one, other in zip(either.caches(growing), either.caches(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_capacity_is_the_limit_whatever_the_blocks(either: Any) -> None:
    session = either.session(capacity=BLOCK + 3)
    session.prefill([either.ids(BLOCK)])
    for token in either.ids(3, seed=1):
        session.step([token])
    assert lengths(either, session) == {BLOCK + 3}
    small = either.session(capacity=BLOCK - 3)
    assert lengths(either, small) == {BLOCK - 3}


def test_snapshots_of_long_rows_go_into_short_sessions_and_back(either: Any, rows_are_independent: bool) -> None:
    del rows_are_independent
    session = either.session(batch=2, capacity=64)
    session.prefill([either.ids(35), either.ids(4, seed=1)])
    other = either.session(batch=2, capacity=48)
    other.restore(session.snapshot())
    fork = session.fork()
    for token in either.ids(6, seed=2):
        wanted = session.step([token, token])
        np.testing.assert_array_equal(other.step([token, token]), wanted)
        np.testing.assert_array_equal(fork.step([token, token]), wanted)
    other.restore(either.session(batch=2).snapshot())
    assert not any(cache.any() for cache in either.caches(other))
    if grows(either, other):
        assert lengths(either, other) == {BLOCK}


def test_a_reset_gives_memory_back_and_starts_afresh(either: Any) -> None:
    session = either.session(capacity=64)
    first = session.prefill([either.ids(50)])
    session.reset()
    if grows(either, session):
        assert lengths(either, session) == {BLOCK}
    assert not any(cache.any() for cache in either.caches(session))
    np.testing.assert_array_equal(session.prefill([either.ids(50)]), first)


def test_a_call_that_fails_while_caches_grow_leaves_a_session_that_can_be_reset(
    crt: Any, overflowing_token: int
) -> None:
    session, fresh = crt.session(batch=2, capacity=64), crt.session(batch=2, capacity=64)
    rows = [crt.ids(6), crt.ids(2, seed=1)]
    session.prefill(rows)
    with pytest.raises(ContractError, match="not finite"):
        session.prefill([[*crt.ids(20), overflowing_token], [40]])
    assert session.position.tolist() == [6, 2]
    session.reset()
    np.testing.assert_array_equal(session.prefill(rows), fresh.prefill(rows))
    np.testing.assert_array_equal(session.step([50, 51]), fresh.step([50, 51]))


def test_memory_that_runs_out_while_caches_grow_poisons_until_reset(crt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session, fresh = crt.session(capacity=64), crt.session(capacity=64)
    if not grows(crt, session):
        pytest.skip("caches on a device do not grow")
    tokens = crt.ids(BLOCK + 4)
    session.prefill([tokens[:BLOCK]])
    own = session._guard.decoder.tensors._caches
    allocate, left = own._allocate, [1]

    def scarce(name: str, rows: int, length: int) -> Any:
        if not left:
            raise MemoryError("no room")
        left.pop()
        return allocate(name, rows, length)

    with monkeypatch.context() as patched:
        patched.setattr(own, "_allocate", scarce)
        with pytest.raises(MemoryError):
            session.step([tokens[BLOCK]])
    session.reset()
    np.testing.assert_array_equal(session.prefill([tokens]), fresh.prefill([tokens]))


def test_rows_evict_in_caches_that_grow(windowed: Any) -> None:
    tokens = windowed.ids(40)
    growing = windowed.session(capacity=BLOCK + 3, on_full="evict")
    found = [growing.step([token])[0] for token in tokens]
    parts = [windowed.logits([], tokens[: count + 1]) for count in range(40)]
    np.testing.assert_allclose(found, parts, rtol=0, atol=5e-5)


def test_a_step_of_a_session_is_the_step_graph(either: Any) -> None:
    session = either.session(batch=2, capacity=32)
    session.prefill([either.ids(11), either.ids(5, seed=1)])
    files, target = either.bundle.files, either.bundle.target(TARGET)
    graph = load_graph(files.graph(target.graphs["step"]), threads=1)
    contents = session._guard.decoder.tensors
    fed = {
        "input_ids": np.array([[60], [61]]),
        "position": session.position,
        **{f"past_key_values.{name}": values for name, values in contents.caches(32).items()},
    }
    states = {name: np.array(values) for name, values in contents.states().items()}
    fed |= states
    wanted = graph.run(fed)
    np.testing.assert_allclose(session.step([60, 61]), wanted["logits"], rtol=0, atol=1e-5)
    assert session.next_tokens.tolist() == wanted["next_token"][:, 0].tolist()
    for name, values in contents.caches(32).items():
        np.testing.assert_allclose(values, wanted[f"present_key_values.{name}"], rtol=0, atol=1e-5)
    assert bool(states) == either.bundle.model.carried.iterated
    for name in states:
        np.testing.assert_allclose(contents.states()[name], wanted[f"next_{name}"], rtol=0, atol=1e-5)


def test_a_session_on_a_cpu_loads_one_graph(either: Any) -> None:
    engine = either.session()._guard.decoder.tensors._engine
    if not engine.one_graph:
        pytest.skip("an engine with graphs of their own for step and prefill")
    name = "prefill_pass" if either.bundle.model.carried.iterated else "prefill"
    assert engine.program("step") is engine.program(name)
