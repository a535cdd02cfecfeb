"""The history of a session's rows: what is drawn is pending until it is fed."""

from __future__ import annotations

import numpy as np

from crt_export.runtime.history import NO_TOKEN, RECENT_TOKENS, History
from crt_export.text_stream import TEXT_END


def test_a_drawn_token_is_seen_and_pending_until_something_is_fed() -> None:
    history = History(2, 8)
    history.draw(1, 5, keep=True)
    assert history.pending.tolist() == [NO_TOKEN, 5]
    assert history.drawn.tolist() == [0, 1]
    assert np.flatnonzero(history.seen[1]).tolist() == [5]
    history.feed(1, [])
    assert history.pending.tolist() == [NO_TOKEN, 5]
    history.feed(1, [5, 2])
    assert history.pending.tolist() == [NO_TOKEN, NO_TOKEN]
    assert np.flatnonzero(history.seen[1]).tolist() == [2, 5]
    assert not history.seen[0].any()
    assert history.recent[1, -3:].tolist() == [TEXT_END, 5, 2]
    assert history.recent[0].max() == TEXT_END


def test_the_newest_of_many_tokens_are_kept() -> None:
    history = History(1, 8)
    history.feed(0, np.arange(RECENT_TOKENS + 3) % 8)
    history.feed(0, [7])
    expected = [*(np.arange(RECENT_TOKENS + 3) % 8)[4:], 7]
    assert history.recent[0].tolist() == expected


def test_text_held_back_is_kept_over_the_pending_token_and_nothing_else() -> None:
    history = History(1, 8)
    for fed, held in (([5], 2), ([6], 0), ([5, 1], 0), ([], 2)):
        history.draw(0, 5, keep=True)
        history.held[0] = 2
        history.feed(0, fed)
        assert history.held[0] == held, fed


def test_a_stop_token_counts_as_a_draw_ends_the_text_and_leaves_no_other_trace() -> None:
    history = History(1, 8)
    history.feed(0, [4])
    history.seen.fill(0)
    history.held[0] = 2
    history.draw(0, 3, keep=False)
    assert (history.drawn[0], history.pending[0], history.seen.any()) == (1, NO_TOKEN, False)
    assert (history.recent[0, -2:].tolist(), history.held[0]) == ([4, TEXT_END], 0)


def test_copies_are_independent_and_clear_forgets_everything() -> None:
    history = History(1, 8)
    history.feed(0, [5])
    history.draw(0, 3, keep=True)
    history.held[0] = 2
    copy = history.copy()
    history.clear()
    assert (copy.drawn[0], copy.pending[0], copy.seen[0, 3], copy.recent[0, -1], copy.held[0]) == (1, 3, 1, 5, 2)
    assert (history.drawn[0], history.pending[0], history.seen.any()) == (0, NO_TOKEN, False)
    assert (history.recent.max(), history.held[0]) == (TEXT_END, 0)
    pending = history.pending
    history.assign(copy)
    assert pending[0] == 3, "whoever holds the arrays sees the change"
