"""Test of calibration text: random tokens, useless for calibration, are told apart from it without any model.

Natural text, in any language and any vocabulary, uses its tokens unevenly, and a token tells something about the next
ones. Uniform noise has neither property; tokens drawn independently from a text's own histogram lack the second. No
model is asked, so that untrained checkpoints made for size tests can be calibrated on real text like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crt_export.errors import InputError, problem_list

#: Text repeats its tokens this much more often than uniform noise, at least (measured: bytes 16 times, words 5000).
TOKEN_MARGIN = 1.5
#: Nats that a token tells about the next or next but one, beyond what a shuffled copy shows (measured: 0.5 to 1.0).
DEPENDENCE_MARGIN = 0.1
#: Both must also lie this many standard deviations away from noise.
DEVIATIONS = 6.0
_LAGS = (1, 2)
_SHUFFLES = 16


@dataclass(frozen=True, kw_only=True)
class TextEvidence:
    """What a sample of tokens shows of being text.

    Attributes:
        tokens: Number of tokens looked at.
        repetition: How often two tokens of the sample are equal, relative to uniform noise (1.0 is noise).
        dependence: Mutual information of tokens one or two apart, whichever is larger, beyond that of a shuffled copy,
            in nats (0.0 is noise).
        problems: Sentences on what text has and this has not; empty if it looks like text.
    """

    tokens: int
    repetition: float
    dependence: float
    problems: tuple[str, ...] = ()


def check_is_text(tokens: NDArray[np.int64], vocab_size: int) -> TextEvidence:
    """Refuse token sequences that no text would produce.

    Args:
        tokens: Token ids, int64 [windows, seq]; neighbours within a window are neighbours in the text.
        vocab_size: Number of tokens there are.

    Returns:
        The measured evidence.

    Raises:
        InputError: Wrong shape or dtype, ids out of range, or the tokens are noise (with the figures that say so).
    """
    evidence = text_evidence(tokens, vocab_size)
    if evidence.problems:
        raise InputError(
            problem_list(
                f"expected text to calibrate on, found {tokens.size} tokens that look random or shuffled "
                "(give real text of the kind the model was trained on)",
                evidence.problems,
            )
        )
    return evidence


def text_evidence(tokens: NDArray[np.int64], vocab_size: int) -> TextEvidence:
    """Measure what text has and noise has not, and judge nothing.

    Args:
        tokens: Token ids, int64 [windows, seq], seq above 2; neighbours within a window are neighbours in the text.
        vocab_size: Number of tokens there are.

    Raises:
        InputError: Wrong shape or dtype, or ids out of range.
    """
    _check_ids(tokens, vocab_size)
    repetition, least_repetition = _repetition(tokens, vocab_size)
    found = [_dependence(tokens, lag) for lag in _LAGS]
    dependence, least_dependence = max(found, key=lambda pair: pair[0] - pair[1])
    problems = []
    if repetition < least_repetition:
        problems.append(
            f"tokens repeat {repetition:.2f} times as often as uniform noise, in text {least_repetition:.2f} or more"
        )
    if dependence < least_dependence:
        problems.append(
            f"a token tells {dependence:.3f} nat about the next ones, in text {least_dependence:.3f} or more"
        )
    return TextEvidence(tokens=tokens.size, repetition=repetition, dependence=dependence, problems=tuple(problems))


def _check_ids(tokens: NDArray[np.int64], vocab_size: int) -> None:
    if tokens.ndim != 2 or tokens.shape[1] <= max(_LAGS) or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(
            f"expected integer tokens [windows, seq] with seq above {max(_LAGS)}, "
            f"found {tokens.dtype} {list(tokens.shape)}"
        )
    if not tokens.size:
        raise InputError("expected tokens to calibrate on, found none")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise InputError(
            f"expected token ids in [0, {vocab_size}), found {int(tokens.min())} to {int(tokens.max())}: "
            "the text was tokenised for another vocabulary"
        )


def _repetition(tokens: NDArray[np.int64], vocab_size: int) -> tuple[float, float]:
    """How often two tokens are equal relative to uniform noise, and how often they must be in text."""
    counts = np.unique(tokens, return_counts=True)[1].astype(np.int64)
    by_chance = tokens.size * (tokens.size - 1) / 2 / vocab_size
    deviation = by_chance**-0.5  # the count of equal pairs is close to Poisson
    return float((counts * (counts - 1) // 2).sum() / by_chance), 1 + max(TOKEN_MARGIN - 1, DEVIATIONS * deviation)


def _dependence(tokens: NDArray[np.int64], lag: int) -> tuple[float, float]:
    """Mutual information at a distance beyond that of shuffled copies, and what it must be in text, in nats."""
    generator = np.random.default_rng(0)
    shuffled = np.array(
        [
            _mutual_information(generator.permutation(tokens.ravel()).reshape(tokens.shape), lag)
            for _ in range(_SHUFFLES)
        ]
    )
    excess = _mutual_information(tokens, lag) - shuffled.mean()
    return float(excess), max(DEPENDENCE_MARGIN, DEVIATIONS * float(shuffled.std()))


def _mutual_information(tokens: NDArray[np.int64], lag: int) -> float:
    first, second = tokens[:, :-lag].astype(np.int64), tokens[:, lag:].astype(np.int64)
    return _entropy(first) + _entropy(second) - _entropy(first * (int(tokens.max()) + 1) + second)


def _entropy(values: NDArray[np.int64]) -> float:
    share = np.unique(values, return_counts=True)[1] / values.size
    return float(-(share * np.log(share)).sum())
