"""From logits to a token, specified so that another language draws the same token.

Tokens are ranked by falling logit, ties to the lower id; each gets the weight exp((logit - largest) /
temperature) in float64; the first ``top_k`` are kept, then the shortest prefix of those that has ``top_p`` of
their weight; one of them is drawn in proportion to its weight. Sums run from left to right in rank order. The
draw is Philox4x32-10 with key (seed, row) and counter (step low word, step high word, 0, 0): random access,
no state but the step number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from crt_export.errors import ContractError, InputError, problem_list

_WORD = 0xFFFFFFFF
# Multipliers and key increments of Philox4x32: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
# SC 2011.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token (greedy); above 0 divides the logits before the softmax.
        top_k: Keep that many of the likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens that together reach this probability; 1 keeps all.
        seed: Key of the random numbers, 0 to 2**32 - 1.

    Raises:
        InputError: A value is out of its range; lists every problem.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature must be a finite number of at least 0, found {self.temperature!r}")
        if self.top_k < 0:
            problems.append(f"top_k must be at least 0 (0 keeps all tokens), found {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, found {self.top_p!r}")
        if not 0 <= self.seed <= _WORD:
            problems.append(f"seed must be between 0 and {_WORD}, found {self.seed!r}")
        if problems:
            raise InputError(problem_list("sampling options", problems))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without any draw."""
        return self.temperature == 0


def sample_token(logits: np.ndarray, options: SamplingOptions, *, row: int, step: int) -> int:
    """Choose one token.

    Args:
        logits: float32 [vocab].
        options: The sampling options.
        row: Row of the batch; rows draw independently.
        step: Number of tokens this row has drawn before in this generation.

    Returns:
        The token id; among equally likely tokens greedy takes the lowest.

    Raises:
        ContractError: The logits hold NaN or +inf, or nothing but -inf.
    """
    largest = float(np.max(logits))
    if not math.isfinite(largest) or np.isnan(logits).any():
        raise ContractError(f"cannot choose a token for row {row}: its logits are not finite (largest: {largest})")
    if options.greedy:
        return int(np.argmax(logits))
    ids = _ranked_ids(logits, options.top_k)
    # A tiny temperature drives all but the likeliest to -inf, whose exponential is the right 0.
    with np.errstate(over="ignore"):
        shifted = (logits[ids].astype(np.float64) - largest) / options.temperature
    cumulative = np.cumsum(np.exp(shifted))
    last = _nucleus_end(cumulative, options.top_p)
    target = uniform(options.seed, row, step) * cumulative[last]
    chosen = min(int(np.searchsorted(cumulative, target, side="right")), last)
    return int(ids[chosen])


def uniform(seed: int, row: int, step: int) -> float:
    """The random number of one draw: a float64 in [0, 1) from the top 53 bits of the first two words."""
    words = philox4x32((step & _WORD, (step >> 32) & _WORD, 0, 0), (seed & _WORD, row & _WORD))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words for a counter and a key of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _INCREMENTS[0]) & _WORD, (k1 + _INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def _ranked_ids(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Ids by falling value, ties to the lower id, at most ``top_k`` of them (0: all)."""
    if not 0 < top_k < logits.size:
        return np.argsort(-logits, kind="stable")
    smallest_kept = np.partition(logits, -top_k)[-top_k]
    candidates = np.flatnonzero(logits >= smallest_kept)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:top_k]


def _nucleus_end(cumulative: np.ndarray, top_p: float) -> int:
    """Index of the last token of the shortest prefix that reaches ``top_p`` of the total."""
    if top_p >= 1:
        return cumulative.size - 1
    reached = int(np.searchsorted(cumulative, top_p * cumulative[-1], side="left"))
    return min(reached, cumulative.size - 1)
