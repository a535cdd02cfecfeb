"""Rows of one session on a CPU: the bits of each are those it has alone, whatever its neighbours bring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from crt_export.runtime.opening import engine_from_target

#: More than a block of the cache, so that it grows with the longest row.
CAPACITY = 320


@pytest.fixture(scope="module")
def long_crt(make_runnable: Callable[..., Any]) -> Iterator[Any]:
    """A recurrent model with room for long rows."""
    sizes = {"num_hidden_layers": 1, "unroll_steps": 3, "max_position_embeddings": 512}
    runnable = make_runnable("long-crt", engine_from_target, **sizes)
    with runnable.bundle:
        yield runnable


@pytest.fixture(scope="module")
def long_plain(make_runnable: Callable[..., Any]) -> Iterator[Any]:
    """A plain transformer with room for long rows."""
    sizes = {"model_type": "transformer", "num_hidden_layers": 2, "max_position_embeddings": 512}
    runnable = make_runnable("long-plain", engine_from_target, **sizes)
    with runnable.bundle:
        yield runnable


def drawn_rows(rng: np.random.Generator, lengths: list[int]) -> list[list[int]]:
    return [rng.integers(32, 256, length).tolist() for length in lengths]


def assert_alone(runnable: Any, calls: list[tuple[list[list[int]], dict[str, Any]]]) -> None:
    """Prefill the batch call by call, then each of its rows alone, and compare to the bit."""
    batch = len(calls[0][0])
    with runnable.session(batch=batch, capacity=CAPACITY) as session:
        together = [session.prefill(rows, **options) for rows, options in calls]
        held = session.snapshot().tensors
    for row in range(batch):
        with runnable.session(capacity=CAPACITY) as session:
            for (rows, options), found in zip(calls, together, strict=True):
                if rows[row]:
                    np.testing.assert_array_equal(session.prefill([rows[row]], **options)[0], found[row])
            alone = session.snapshot().tensors
        position = int(alone["position"][0])
        for name, values in alone.items():
            shared = held[name][row : row + 1]
            shared = shared[:, :, :position] if name.startswith("past_key_values") else shared
            np.testing.assert_array_equal(shared, values, err_msg=name)


@pytest.mark.parametrize("passes", [1, 2, 3, 10, "exact", None])
def test_rows_that_share_a_prefill_have_the_bits_they_have_alone(long_crt: Any, passes: Any) -> None:
    rng = np.random.default_rng(0)
    for lengths in ([3, 1], [3, 37], [5, 4], [8, 10], [20, 10], [1, 2, 2, 7], [6, 6, 6], [3, 200, 3], [140, 9, 140]):
        assert_alone(long_crt, [(drawn_rows(rng, lengths), {"passes": passes})])


@pytest.mark.parametrize("chunk", [1, 2, 7, None])
def test_nor_do_chunks_and_unlike_positions_change_them(long_crt: Any, chunk: int | None) -> None:
    rng = np.random.default_rng(1)
    calls = [
        (drawn_rows(rng, lengths), {"passes": passes, "chunk": chunk})
        for lengths, passes in (([4, 9, 1], 2), ([7, 7, 0], 3), ([5, 0, 5], 2), ([2, 2, 2], 1))
    ]
    assert_alone(long_crt, calls)


def test_nor_in_a_plain_transformer(long_plain: Any) -> None:
    rng = np.random.default_rng(2)
    for lengths in ([3, 1], [3, 37], [1, 1, 9], [150, 2], [6, 6]):
        assert_alone(long_plain, [(drawn_rows(rng, lengths), {}), (drawn_rows(rng, [1, *lengths[1:]]), {})])


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("kind", ["long_crt", "long_plain"])
def test_a_step_has_the_bits_it_has_alone(request: pytest.FixtureRequest, kind: str, batch: int) -> None:
    """One token per row: equal lengths, so rows share the call at any positions."""
    runnable = request.getfixturevalue(kind)
    rng = np.random.default_rng(batch)
    prompts = drawn_rows(rng, rng.integers(1, 40, batch).tolist())
    prompts[0] = drawn_rows(rng, [200])[0]
    steps = rng.integers(32, 256, (4, batch)).tolist()
    with runnable.session(batch=batch, capacity=CAPACITY) as session:
        session.prefill(prompts)
        together = [session.step(tokens) for tokens in steps]
    for row in range(batch):
        with runnable.session(capacity=CAPACITY) as session:
            session.prefill([prompts[row]])
            for tokens, found in zip(steps, together, strict=True):
                np.testing.assert_array_equal(session.step([tokens[row]])[0], found[row])
