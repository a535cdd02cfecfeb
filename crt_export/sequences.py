"""Where sequences begin: windows and prompts cut out of token ids, each with the model's begin-of-sequence token.

A model that was trained with such a token has learnt to find it at position 0 and predicts badly without it. So what is
cut out of the middle of a text begins with it too: a window's first input is that token, its first target the text's
next one. Where the ids have the token at that place already, it is theirs, not a second one. Without such a token
nothing is put anywhere, and the first input of a window is the last target of the window before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: A target that no model predicts: the begin of the next sequence, where the ids hold several.
UNSCORED = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Consecutive windows, one behind the other, int64 [tokens] each.

    Attributes:
        inputs: What is fed.
        targets: What comes next; ``UNSCORED`` where that is the begin-of-sequence token.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]


def cut_sequences(
    ids: NDArray[np.int64], *, tokens: int, window: int, bos: int | None, start: int = 0
) -> Sequences | int:
    """Cut consecutive windows out of a text.

    Args:
        ids: The text, int64 [n].
        tokens: Tokens to feed and to predict, in all; the last window ends early where they are no multiple.
        window: Tokens of a window.
        bos: The model's begin-of-sequence token; None if it has none.
        start: Index of the text's first token that is used.

    Returns:
        The windows; where the text is too short, how many tokens it needs to have.
    """
    starts = _first_targets(ids, -(-tokens // window), window, bos, start)
    predicted = (starts[:, None] + np.arange(window)).ravel()[:tokens]
    if predicted[-1] >= len(ids):
        return int(predicted[-1]) + 1
    inputs, targets = ids[predicted - 1].astype(np.int64), ids[predicted].astype(np.int64)
    if bos is not None:
        inputs[::window] = bos
        targets[targets == bos] = UNSCORED
    return Sequences(inputs=inputs, targets=targets)


def fill_unscored(nll: NDArray[np.float64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Likelihoods in which an unscored target has the mean of its window's others, so that no mean over it changes.

    Args:
        nll: Negative log-likelihoods, nats [..., windows, positions]; anything where the target is unscored.
        targets: int64 [windows, positions].
    """
    scored = targets != UNSCORED
    if scored.all():
        return nll
    count = np.maximum(scored.sum(axis=-1, keepdims=True), 1)
    return np.where(scored, nll, np.where(scored, nll, 0.0).sum(axis=-1, keepdims=True) / count)


def begin_rows(rows: NDArray[np.int64], bos: int | None) -> NDArray[np.int64]:
    """Rows of the same length that begin with the token; one that does not yet is moved by one and loses its last.

    Args:
        rows: Pieces of a text, int64 [rows, seq].
        bos: The model's begin-of-sequence token; None if it has none.
    """
    if bos is None:
        return rows
    moved = np.concatenate([np.full_like(rows[:, :1], bos), rows[:, :-1]], axis=1)
    return np.where(rows[:, :1] == bos, rows, moved)


def _first_targets(ids: NDArray[np.int64], count: int, window: int, bos: int | None, start: int) -> NDArray[np.int64]:
    """Index of the first token that each window predicts."""
    if bos is None:
        return start + 1 + np.arange(count) * window
    found, target = [], start
    for _ in range(count):
        while target < len(ids) and ids[target] == bos:
            target += 1
        found.append(target)
        target += window
    return np.array(found)
