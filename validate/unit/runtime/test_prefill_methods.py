"""Token by token, in passes, in passes until their residual is small: what a target chooses, what a call asks for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.bundle import open_bundle
from crt_export.bundle.manifest import sealed
from crt_export.engine.base import BufferSlice, Engine, Launch
from crt_export.errors import BundleError, InputError, UnsupportedError
from crt_export.runtime import Bundle, GenerationOptions
from crt_export.runtime.bundle import OpenEngine
from crt_export.runtime.opening import engine_from_target

CLOSE = {"rtol": 0, "atol": 2e-5}
TARGET = "ort-cpu-fp32"
PLAN = {
    "method": "adaptive",
    "passes": 4,
    "chunk": 8,
    "shortest": 1,
    "residual_bound": 1e-3,
    "perplexity_gap": 0.01,
}
Planned = Callable[..., Bundle]


@pytest.fixture
def planned(crt_path: Path, tmp_path: Path) -> Iterator[Planned]:
    """The recurrent bundle with another ``prefill`` in its manifest."""
    opened = []

    def make(engine: OpenEngine = engine_from_target, **changes: Any) -> Bundle:
        folder = Path(shutil.copytree(crt_path, tmp_path / f"bundle{len(opened)}", copy_function=os.link))
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["targets"][TARGET]["prefill"] = {**PLAN, **changes}
        path.unlink()
        path.write_text(json.dumps(sealed(manifest)))
        opened.append(Bundle(open_bundle(folder, allow_unvalidated=True), engine))
        return opened[-1]

    yield make
    for bundle in opened:
        bundle.close()


def recurrence(bundle: Bundle, prompt: list[int]) -> np.ndarray:
    """Logits after feeding token by token."""
    session = bundle.session(TARGET)
    for token in prompt:
        session.step([token])
    return session.logits


class CountingEngine:
    """Notes how many tokens every call of a graph takes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.calls: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def program(self, graph: str) -> Any:
        program, calls = self._engine.program(graph), self.calls

        class Counted:
            inputs, outputs = program.inputs, program.outputs

            def bind(
                self, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice], *, repeated: bool = False
            ) -> Launch:
                launch = program.bind(inputs, outputs, repeated=repeated)

                def counted() -> None:
                    calls.append(inputs["input_ids"].shape[1])
                    launch()

                return counted

        return Counted()


@pytest.fixture
def counting() -> tuple[OpenEngine, list[CountingEngine]]:
    """Opens engines that count, and those it opened."""
    engines: list[CountingEngine] = []

    def open_counting(*arguments: Any) -> Any:
        engines.append(CountingEngine(engine_from_target(*arguments)))
        return engines[-1]

    return open_counting, engines


def test_exact_is_step_by_step_to_the_last_bit(either: Any) -> None:
    rows = [either.ids(9), [], either.ids(3, seed=1)]
    exact, stepped = either.session(batch=3), either.session(batch=3)
    found = exact.prefill(rows, passes="exact")
    for index in range(9):
        stepped.step([row[index] if index < len(row) else None for row in rows])
    if either.model.config.carried.iterated:
        np.testing.assert_array_equal(found, stepped.logits)
    np.testing.assert_allclose(found, stepped.logits, **CLOSE)
    assert exact.position.tolist() == [9, 0, 3]


def test_exact_tokens_take_part_in_no_further_pass(planned: Planned, counting: Any, crt: Any) -> None:
    open_engine, engines = counting
    bundle = planned(open_engine)
    prompt = crt.ids(9)
    found = bundle.session(TARGET).prefill([prompt], passes=5)
    assert engines[0].calls == [9, 8, 7, 6, 5]
    np.testing.assert_allclose(found[0], crt.logits([prompt], [], passes=5), **CLOSE)


def test_no_more_passes_than_tokens(planned: Planned, counting: Any, crt: Any) -> None:
    open_engine, engines = counting
    bundle = planned(open_engine)
    bundle.session(TARGET).prefill([crt.ids(4)], passes=100)
    assert engines[0].calls == [4, 3, 2, 1]


def test_a_short_row_keeps_the_tokens_of_its_longer_neighbour_from_nothing_but_work(planned: Planned, crt: Any) -> None:
    rows = [crt.ids(9), crt.ids(3, seed=1), crt.ids(1, seed=2)]
    bundle = planned()
    together = bundle.session(TARGET, batch=3)
    found = together.prefill(rows, passes=4)
    for row, prompt in enumerate(rows):
        alone = bundle.session(TARGET)
        np.testing.assert_allclose(found[row], alone.prefill([prompt], passes=4)[0], **CLOSE)


def test_adaptive_stops_at_the_first_residual_within_the_bound(planned: Planned, counting: Any, crt: Any) -> None:
    open_engine, engines = counting
    prompt = crt.ids(8)
    residuals = residuals_of(crt, prompt)
    stop = 2
    bundle = planned(open_engine, passes=7, residual_bound=float(residuals[stop - 1]) * 1.001)
    found = bundle.session(TARGET).prefill([prompt])
    assert engines[0].calls == [8, 7][:stop]
    np.testing.assert_allclose(found[0], crt.logits([prompt], [], passes=stop), **CLOSE)


def residuals_of(crt: Any, prompt: list[int]) -> list[float]:
    """Residual of PyTorch after each pass."""
    import torch

    iterate, found = None, []
    with torch.no_grad():
        for _ in range(4):
            done, _, residual = crt.model.unroll(torch.tensor([prompt]), 1, iterate=iterate)
            iterate = done.states
            found.append(float(residual))
    assert found == sorted(found, reverse=True), "the test needs a residual that falls"
    return found


def test_adaptive_goes_on_token_by_token_where_its_passes_do_not_suffice(
    planned: Planned, open_engine: OpenEngine, crt: Any
) -> None:
    prompt, more = crt.ids(13), crt.ids(3, seed=4)
    bundle = planned(open_engine, passes=2, residual_bound=1e-30)
    session = bundle.session(TARGET)
    np.testing.assert_allclose(session.prefill([prompt]), recurrence(bundle, prompt), **CLOSE)
    np.testing.assert_allclose(session.prefill([more]), recurrence(bundle, prompt + more), **CLOSE)
    np.testing.assert_allclose(session.step([50]), recurrence(bundle, [*prompt, *more, 50]), **CLOSE)
    assert session.position.tolist() == [17]


def test_the_rest_goes_one_token_a_call(planned: Planned, counting: Any, crt: Any) -> None:
    open_engine, engines = counting
    planned(open_engine, passes=2, residual_bound=1e-30).session(TARGET).prefill([crt.ids(7)])
    assert engines[0].calls == [7, 6, 1, 1, 1, 1, 1]


def test_passes_of_a_row_do_not_depend_on_its_neighbours(planned: Planned, crt: Any) -> None:
    rows = [crt.ids(8), crt.ids(5, seed=1), [], crt.ids(8, seed=2)]
    bundle = planned(residual_bound=residuals_of(crt, rows[0])[1])
    found = bundle.session(TARGET, batch=4).prefill(rows)
    for row, prompt in enumerate(rows):
        if prompt:
            np.testing.assert_array_equal(found[row], bundle.session(TARGET).prefill([prompt])[0])


def test_a_target_of_steps_steps(planned: Planned, counting: Any, crt: Any) -> None:
    open_engine, engines = counting
    bundle = planned(open_engine, method="steps")
    prompt = crt.ids(9)
    found = bundle.session(TARGET).prefill([prompt])
    assert engines[0].calls == [1] * 9
    np.testing.assert_array_equal(found, recurrence(bundle, prompt))


def test_short_chunks_go_token_by_token_unless_passes_are_named(planned: Planned, counting: Any, crt: Any) -> None:
    open_engine, engines = counting
    bundle = planned(open_engine, method="passes", passes=2, shortest=4)
    session = bundle.session(TARGET, batch=2)
    session.prefill([crt.ids(11), crt.ids(2)])  # chunks of 8
    assert engines[0].calls == [1, 1, 8, 7, 1, 1, 1]
    engines[0].calls.clear()
    session.prefill([crt.ids(3), []], passes=1)
    assert engines[0].calls == [3]


def test_adaptive_can_be_asked_of_a_target_of_passes(planned: Planned, counting: Any, crt: Any) -> None:
    open_engine, engines = counting
    bundle = planned(open_engine, method="passes", passes=crt.passes, residual_bound=1e-30)
    prompt = crt.ids(6)
    found = bundle.session(TARGET).prefill([prompt], passes="adaptive")
    assert engines[0].calls == [6, 5, 4, 1, 1, 1]
    np.testing.assert_allclose(found, recurrence(bundle, prompt), **CLOSE)


def test_a_bound_beyond_float32_is_its_largest_number(planned: Planned, counting: Any, crt: Any) -> None:
    open_engine, engines = counting
    planned(open_engine, residual_bound=1e300).session(TARGET).prefill([crt.ids(8)])
    assert engines[0].calls == [8]


def test_a_bundle_of_earlier_versions_takes_the_passes_it_was_built_with(crt: Any) -> None:
    assert crt.bundle.target(TARGET).prefill.residual_bound is None
    prompt = crt.ids(9)
    np.testing.assert_allclose(crt.session().prefill([prompt])[0], crt.logits([prompt], []), **CLOSE)
    with pytest.raises(UnsupportedError, match="no bound for the residual"):
        crt.session().prefill([prompt], passes="adaptive")


def test_words_that_are_none(crt: Any, plain: Any) -> None:
    with pytest.raises(InputError, match="passes must be a number, 'adaptive' or 'exact', found 'all'"):
        crt.session().prefill([[40]], passes="all")
    with pytest.raises(InputError, match="passes must be at least 1, 'adaptive' or 'exact'"):
        GenerationOptions(passes="all")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="this model has exactly one pass"):
        plain.session().prefill([[40]], passes="adaptive")


def test_generation_takes_the_words_too(planned: Planned, crt: Any) -> None:
    bundle = planned()
    session = bundle.session(TARGET)
    next(session.generate([crt.ids(6)], GenerationOptions(max_new_tokens=1, passes="exact")))
    np.testing.assert_array_equal(session.logits, recurrence(bundle, crt.ids(6)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "guess"}, "'method' must be one of steps, passes, adaptive, found 'guess'"),
        ({"passes": 0}, "'passes' must be 1 or more, found 0"),
        ({"chunk": 0}, "'chunk' must be 1 or more, found 0"),
        ({"residual_bound": -1.0}, "'residual_bound' must be a number above 0, found -1.0"),
        ({"residual_bound": None}, "'adaptive' needs a 'residual_bound'"),
        ({"shortest": "3"}, "'shortest' must be an integer"),
    ],
)
def test_an_impossible_plan_is_refused(planned: Planned, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        planned(**changes)
