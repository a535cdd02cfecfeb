"""Every sequence begins with the begin-of-sequence token, once; without one nothing is put anywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crt_export.bench.runner import prompt_rows
from crt_export.quantize.calibration import CalibrationOptions, calibration_windows
from crt_export.text import UNSCORED, Sequences, begin_rows, cut_sequences, fill_unscored

BOS = 9


def cut(ids: list[int], tokens: int, window: int, bos: int | None = BOS) -> tuple[list[int], list[int]]:
    found = cut_sequences(np.array(ids), tokens=tokens, window=window, bos=bos)
    assert isinstance(found, Sequences), found
    return found.inputs.tolist(), found.targets.tolist()


def test_without_the_token_windows_follow_each_other() -> None:
    assert cut([0, 1, 2, 3, 4, 5, 6], 6, 3, None) == ([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])
    assert cut([0, 1, 2, 3, 4, 5], 5, 3, None) == ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])


def test_every_window_begins_with_it_and_predicts_the_text_from_its_first_token_on() -> None:
    assert cut([0, 1, 2, 3, 4, 5], 6, 3) == ([BOS, 0, 1, BOS, 3, 4], [0, 1, 2, 3, 4, 5])
    assert cut([0, 1, 2, 3, 4], 5, 3) == ([BOS, 0, 1, BOS, 3], [0, 1, 2, 3, 4])


def test_where_the_ids_have_it_at_that_place_it_is_not_doubled() -> None:
    assert cut([BOS, 0, 1, 2, BOS, 3, 4, 5], 6, 3) == ([BOS, 0, 1, BOS, 3, 4], [0, 1, 2, 3, 4, 5])
    assert cut([BOS, 0, 1, BOS, 3, 4, BOS], 6, 3) == ([BOS, 0, 1, BOS, 3, 4], [0, 1, UNSCORED, 3, 4, UNSCORED])


def test_it_is_fed_within_a_window_and_never_a_target() -> None:
    assert cut([0, BOS, 2, 3], 4, 4) == ([BOS, 0, BOS, 2], [0, UNSCORED, 2, 3])


@pytest.mark.parametrize(("bos", "needed"), [(None, 7), (BOS, 6)])
def test_too_short_a_text_says_how_many_tokens_it_takes(bos: int | None, needed: int) -> None:
    assert cut_sequences(np.zeros(5, np.int64), tokens=6, window=3, bos=bos) == needed
    assert isinstance(cut_sequences(np.zeros(needed, np.int64), tokens=6, window=3, bos=bos), Sequences)


@given(ids=st.lists(st.integers(0, BOS), min_size=80, max_size=80), window=st.integers(2, 9))
@settings(deadline=None, derandomize=True)
def test_of_any_text_every_window_begins_with_one_and_goes_on_as_the_text_does(ids: list[int], window: int) -> None:
    found = cut_sequences(np.array(ids), tokens=3 * window, window=window, bos=BOS)
    if isinstance(found, int):
        assert found > len(ids)
        return
    inputs, targets = found.inputs.reshape(3, window), found.targets.reshape(3, window)
    assert (inputs[:, 0] == BOS).all()
    assert (targets[:, 0] != UNSCORED).all(), "a second one behind the first"
    assert not (targets == BOS).any()
    assert np.array_equal(inputs[:, 1:], np.where(targets == UNSCORED, BOS, targets)[:, :-1])


def test_an_unscored_target_changes_no_mean() -> None:
    targets = np.array([[1, UNSCORED, 3, 4], [1, 2, 3, 4]])
    nll = np.array([[1.0, 99.0, 2.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    filled = fill_unscored(nll, targets)
    assert filled.tolist() == [[1.0, 3.0, 2.0, 6.0], [1.0, 2.0, 3.0, 4.0]]
    assert fill_unscored(np.stack([nll, nll + 1]), targets)[1, 0].tolist() == [2.0, 4.0, 3.0, 7.0]
    assert fill_unscored(nll[1:], targets[1:]) is not None
    broken = fill_unscored(np.where(nll == 2.0, np.nan, nll), targets)
    assert np.isnan(broken[0, 2]), "a figure that is not finite stays one"


def test_rows_of_one_length_begin_with_it_once() -> None:
    rows = np.array([[1, 2, 3], [BOS, 4, 5]])
    assert begin_rows(rows, BOS).tolist() == [[BOS, 1, 2], [BOS, 4, 5]]
    assert begin_rows(rows, None) is rows


def test_windows_of_calibration_and_prompts_of_the_benchmark_begin_with_it() -> None:
    options = CalibrationOptions(windows=4, minimum_tokens=1)
    windows = calibration_windows(np.arange(40), seq=5, options=options, bos=99)
    assert (windows[:, 0] == 99).all()
    assert windows[0].tolist() == [99, 0, 1, 2, 3]
    assert calibration_windows(np.arange(40), seq=5, options=options)[0].tolist() == [0, 1, 2, 3, 4]
    for text in ((3, 1, 2), ()):
        rows = prompt_rows(text, 5, batch=3, tokens=4, bos=4)
        assert rows.shape == (3, 4)
        assert (rows[:, 0] == 4).all()
