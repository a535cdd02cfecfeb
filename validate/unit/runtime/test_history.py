"""The history of a session's rows: what is drawn is pending until it is fed."""

from __future__ import annotations

import numpy as np

from crt_export.runtime.history import NO_TOKEN, History


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


def test_a_stop_token_counts_as_a_draw_and_leaves_no_other_trace() -> None:
    history = History(1, 8)
    history.draw(0, 3, keep=False)
    assert (history.drawn[0], history.pending[0], history.seen.any()) == (1, NO_TOKEN, False)


def test_copies_are_independent_and_clear_forgets_everything() -> None:
    history = History(1, 8)
    history.draw(0, 3, keep=True)
    copy = history.copy()
    history.clear()
    assert (copy.drawn[0], copy.pending[0], copy.seen[0, 3]) == (1, 3, 1)
    assert (history.drawn[0], history.pending[0], history.seen.any()) == (0, NO_TOKEN, False)
    pending = history.pending
    history.assign(copy)
    assert pending[0] == 3, "whoever holds the arrays sees the change"
