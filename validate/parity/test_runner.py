"""The runner gives what a session gives, bit by bit, out of the same files, and sees what no session looks at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fault_bundle import SpoiledBundle
from fault_edits import Edit, constant, nan_at, node, replace_output, times_zero

from crt_export.bundle import BundleFiles, open_bundle
from crt_export.parity.decoding import Decoding
from crt_export.parity.runner import Runner, open_runner, runner_of_files
from crt_export.profile import load_profile
from crt_export.runtime import Bundle, Session
from crt_export.text import TokenText

TARGETS = ("ort-cpu-fp32", "ort-cpu-int8", "ort-cuda-fp16")
CPU_TARGETS = TARGETS[:2]
ROWS, LENGTH, CAPACITY = 3, 24, 64


@pytest.fixture(scope="module")
def ids(real_text: TokenText) -> np.ndarray:
    return real_text.ids[: ROWS * LENGTH].reshape(ROWS, LENGTH)


@pytest.fixture
def opened(three_targets: Path) -> Callable[[str], tuple[BundleFiles, Runner]]:
    def open_it(target: str) -> tuple[BundleFiles, Runner]:
        files = open_bundle(three_targets, allow_unvalidated=True)
        return files, open_runner(files, target, 1)

    return open_it


def _session(files: BundleFiles, target: str) -> Session:
    return Bundle(files).session(target, batch=ROWS, threads=1)


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_steps_prefill_and_handover_are_those_of_a_session(
    opened: Callable[[str], tuple[BundleFiles, Runner]], three_targets: Path, ids: np.ndarray, target: str
) -> None:
    files, runner = opened(target)
    session = _session(open_bundle(three_targets, allow_unvalidated=True), target)
    decoding = runner.decoding(ROWS, CAPACITY)
    decoding.prefill(ids[:, : LENGTH // 2], 2)
    expected = session.prefill(list(ids[:, : LENGTH // 2]), passes=2)
    np.testing.assert_array_equal(decoding.logits(), expected)
    for position in range(LENGTH // 2, LENGTH):
        decoding.step(ids[:, position])
        np.testing.assert_array_equal(decoding.logits(), session.step(ids[:, position].tolist()))
        assert (decoding.broken, decoding.refused) == ([], [])
    assert decoding.position == session.position.tolist() == [LENGTH] * ROWS
    np.testing.assert_array_equal(decoding.next_tokens(), session.next_tokens)
    found = {**decoding.states(), **{f"past_key_values.{k}": v for k, v in decoding.caches(LENGTH).items()}}
    tensors = session.snapshot().tensors
    for name, values in found.items():
        assert values is not None
        np.testing.assert_array_equal(values, tensors[name], err_msg=name)
    session.reset()
    decoding.reset()
    decoding.step(ids[:, 0])
    np.testing.assert_array_equal(decoding.logits(), session.step(ids[:, 0].tolist()))
    files.close()


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_the_runner_opens_the_files_that_a_session_opens(
    opened: Callable[[str], tuple[BundleFiles, Runner]], three_targets: Path, ids: np.ndarray, target: str
) -> None:
    files, runner = opened(target)
    mine = open_bundle(three_targets, allow_unvalidated=True)
    _session(mine, target).prefill(list(ids))
    decoding = runner.decoding(ROWS, CAPACITY)
    decoding.prefill(ids, 2)
    assert files.used == mine.used
    assert files.used == {runner.target.graphs["prefill_pass"], f"graphs/{runner.target.profile.precision}.weights"}
    runner.head(decoding.hidden)
    assert files.used - mine.used == {runner.target.graphs["head"]}


def test_a_target_of_a_gpu_runs_its_own_files(
    opened: Callable[[str], tuple[BundleFiles, Runner]], ids: np.ndarray
) -> None:
    files, runner = opened("ort-cuda-fp16")
    assert not runner.one_graph
    decoding = runner.decoding(ROWS, CAPACITY)
    decoding.prefill(ids[:, :12], 2)
    decoding.step(ids[:, 12])
    assert (decoding.broken, decoding.refused) == ([], [])
    assert files.used == {runner.target.graphs["step"], runner.target.graphs["prefill"], "graphs/fp16.weights"}
    unrolled = np.array(decoding.logits())
    decoding.reset()
    decoding.prefill(ids[:, :12], 2, pass_by_pass=True)
    decoding.step(ids[:, 12])
    np.testing.assert_array_equal(decoding.logits(), unrolled)


def test_a_compiled_target_has_the_capacity_of_its_engines(
    opened: Callable[[str], tuple[BundleFiles, Runner]], ids: np.ndarray
) -> None:
    files, runner = opened("ort-cuda-fp16")
    profile = load_profile("rtx-sm80-fp16").with_unroll(2)
    target = dataclasses.replace(runner.target, name=profile.name, profile=profile)
    compiled = runner_of_files(target, runner.config, lambda graph: files.held_graph(target.graphs[graph]), 1)
    decoding = compiled.decoding(ROWS, 8)
    decoding.prefill(ids[:, :12], 2)
    assert (compiled.capacity, decoding.capacity, compiled.engine.max_tokens) == (CAPACITY, CAPACITY, 256)
    assert (decoding.broken, decoding.refused) == ([], [])


@pytest.mark.parametrize("target", TARGETS)
def test_the_head_gives_the_logits_of_the_last_token(
    opened: Callable[[str], tuple[BundleFiles, Runner]], ids: np.ndarray, target: str
) -> None:
    _, runner = opened(target)
    decoding = runner.decoding(ROWS, CAPACITY)
    decoding.prefill(ids, 2)
    assert np.isfinite(decoding.hidden).all()
    np.testing.assert_allclose(runner.head(decoding.hidden)[:, -1], decoding.logits(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("target", CPU_TARGETS)
def test_decoding_goes_on_from_another_place(
    opened: Callable[[str], tuple[BundleFiles, Runner]], ids: np.ndarray, target: str
) -> None:
    _, runner = opened(target)
    decoding = runner.decoding(ROWS, CAPACITY)
    for position in range(10):
        decoding.step(ids[:, position])
    states, caches = decoding.states(), decoding.caches(10)
    for position in range(10, LENGTH):
        decoding.step(ids[:, position])
    other = runner.decoding(ROWS, CAPACITY)
    other.step(ids[:, 5])
    other.place(10, states, caches)
    for position in range(10, LENGTH):
        other.step(ids[:, position])
    np.testing.assert_array_equal(other.logits(), decoding.logits())


def test_emptied_caches_keep_the_state(opened: Callable[[str], tuple[BundleFiles, Runner]], ids: np.ndarray) -> None:
    _, runner = opened("ort-cpu-fp32")
    decoding = runner.decoding(ROWS, CAPACITY)
    decoding.step(ids[:, 0])
    states = decoding.states()
    decoding.empty_caches()
    assert decoding.position == [0] * ROWS
    np.testing.assert_array_equal(decoding.states()["state"], states["state"])
    decoding.step(ids[:, 1])
    carried = np.array(decoding.logits())
    decoding.reset()
    decoding.step(ids[:, 1])
    assert not np.array_equal(decoding.logits(), carried)


# --- what a session does not look at
@pytest.fixture
def spoiled(parity_bundle: Path, tmp_path: Path) -> Callable[..., Decoding]:
    """``spoiled(edit, ...)``: a decoding of the target whose one graph was edited."""

    def edit(*edits: Edit) -> Decoding:
        copy = SpoiledBundle(parity_bundle, tmp_path / "bundle", "ort-cpu-fp32")
        copy.edit(["prefill_pass"], *edits)
        copy.sign()
        return open_runner(open_bundle(copy.path), "ort-cpu-fp32", 1).decoding(ROWS, CAPACITY)

    return edit


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            replace_output("next_position", node("Identity", ["position"], "next_position")),
            f"prefill_pass: next_position is 0 after token {LENGTH - 1} of row 0, expected {LENGTH}",
        ),
        (
            replace_output("next_state", *times_zero("before", "next_state")),
            "prefill_pass: next_state is not next_hidden of the last token",
        ),
        (
            replace_output("next_token", constant("one", 1), node("Add", ["before", "one"], "next_token")),
            f"prefill_pass: next_token after token {LENGTH - 1} of row 0 is not the argmax of logits",
        ),
    ],
)
def test_outputs_that_contradict_each_other_are_named(
    spoiled: Callable[..., Decoding], ids: np.ndarray, edit: Edit, sentence: str
) -> None:
    decoding = spoiled(edit)
    decoding.prefill(ids, 1)
    assert decoding.broken == [sentence]


def test_what_is_not_finite_is_noted_and_decoding_goes_on(spoiled: Callable[..., Decoding], ids: np.ndarray) -> None:
    decoding = spoiled(nan_at("logits", 2))
    noted = []
    for position in range(5):
        decoding.step(ids[:, position])
        noted.append([*decoding.refused])
    assert [bool(texts) for texts in noted] == [False, False, True, False, False]
    assert "logits is not finite" in noted[2][0]
    assert decoding.position == [5] * ROWS
