"""The choice of a token from logits: the specification that every language implements bit for bit.

Every number is an IEEE 754 float64, every operation rounded on its own (to nearest, ties to even): no fused
multiply-add (C and C++: ``-ffp-contract=off``, never ``-ffast-math``), no other order of a sum.

Given are the logits of one row (float32, one per token), the options, ``seen`` (per token whether the row was fed
it or drew it and kept it; see rows.py), the row's number in the batch, and ``step``: the number of tokens this row
has drawn before, greedy choices and stop tokens included.

1. *Penalty.* v = float64(logit). For a seen token, and a ``repetition_penalty`` p other than 1: v / p where v > 0,
   else v * p. If then a v is NaN, or the largest is not finite, there is no token to choose: ContractError.
2. *Greedy.* Temperature 0 takes the largest v, the lowest id among equals, and ends here. No random number is used.
3. *Top-k.* Tokens are ranked by falling v, equal ones (0.0 and -0.0 too) by rising id. The first ``top_k`` stay; 0
   keeps all. The steps that follow go in this order, and ``i`` is a place in it, from 0.
4. *Temperature.* x[i] = (v[i] - v[0]) / temperature; w[i] = specified_exp(x[i]). w[0] is exactly 1.
5. *Sums.* c[0] = w[0]; c[i] = c[i-1] + w[i].
6. *Top-p.* If ``top_p`` < 1: last = the first i with c[i] >= top_p * c[n-1], where n tokens stayed. Else last = n-1.
7. *Min-p.* If ``min_p`` > 0 and some i <= last has w[i] < min_p * w[0]: last = the first such i, less one.
8. *Draw.* The token in the first place i with c[i] > uniform(seed, row, step) * c[last], at most ``last``.

**specified_exp(x)**, for x <= 0, is exp(x) to about one unit in the last place, exactly 1 at 0:

* x < -700 (and minus infinity) gives 0.
* k = x * 1.4426950408889634 rounded to a whole number, halves to the even one.
* r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10.
* p = 1/13!; then for n = 12 down to 0: p = p * r + 1/n! (a product, then a sum). 1/n! is the float64 quotient of 1
  and n!, and every n! here is a whole number that float64 holds.
* The result is p * 2**k, which is exact: k is at least -1010, p close to 1, the result never subnormal.

**uniform(seed, row, step)** is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
with key (seed, row) and counter (step mod 2**32, step div 2**32, 0, 0), each word 32 bits. Of the resulting words
a, b, c, d: ((a * 2**32 + b) div 2**11) * 2**-53, a float64 in [0, 1). Random access: no state but the step number, so
rows are independent and a generation goes on anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from crt_export.checked import Checked, Rule, Rules, plain_float, whole, whole_number
from crt_export.errors import ContractError

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_SMALLEST_EXPONENT = -700.0
_PER_LN2 = 1.4426950408889634
# ln 2 in two parts; the first ends in 21 zero bits, so that k times it is exact.
_LN2_HIGH = 6.93147180369123816490e-01
_LN2_LOW = 1.90821492927058770002e-10
_RECIPROCAL_FACTORIALS = tuple(1.0 / math.factorial(n) for n in range(14))


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Checked):
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token (greedy); above 0 divides the logits before the softmax.
        top_k: Keep that many of the likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: Drop tokens less likely than this fraction of the likeliest; 0 keeps all.
        repetition_penalty: Above 1 makes tokens less likely that the row was fed or has drawn: their logit is
            divided by it where positive, else multiplied. Below 1 makes them more likely.
        seed: Key of the random numbers, 0 to 2**32 - 1.

    Raises:
        InputError: A value is out of its range; lists every problem.
    """

    HEADING: ClassVar[str] = "sampling options"
    RULES: ClassVar[Rules] = {
        "temperature": Rule(plain_float, "a finite number of at least 0", lambda value: value >= 0),
        "top_k": whole("at least 0 (0 keeps all tokens)", least=0),
        "top_p": Rule(plain_float, "above 0 and at most 1", lambda value: 0 < value <= 1),
        "min_p": Rule(plain_float, "between 0 and 1", lambda value: 0 <= value <= 1),
        "repetition_penalty": Rule(plain_float, "a finite number above 0", lambda value: value > 0),
        "seed": whole(f"between 0 and {_WORD}", least=0, most=_WORD),
    }

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without any draw."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether the tokens that a row has seen change the choice."""
        return self.repetition_penalty != 1


def sample_token(
    logits: np.ndarray, options: SamplingOptions, *, row: int, step: int, seen: np.ndarray | None = None
) -> int:
    """Choose one token, as the specification above says.

    Args:
        logits: float32 [vocab].
        options: The sampling options.
        row: Row of the batch; rows draw independently.
        step: Number of tokens this row has drawn before.
        seen: What the repetition penalty applies to, not zero for such tokens, [vocab]; None for nothing.

    Returns:
        The token id; among equally likely tokens greedy takes the lowest.

    Raises:
        InputError: Row or step is not a whole number of at least 0.
        ContractError: The logits hold NaN or +inf, or nothing but -inf, or the penalty makes them infinite.
    """
    row, step = whole_number("row", row, least=0), whole_number("step", step, least=0)
    values = _penalised(logits, seen, options)
    largest = float(np.max(values))  # NaN if there is one
    if not math.isfinite(largest):
        raise ContractError(f"cannot choose a token for row {row}: its logits are not finite (largest: {largest})")
    if options.greedy:
        return int(np.argmax(values))
    ids = _ranked_ids(values, options.top_k)
    # A tiny temperature drives all but the likeliest to -inf, whose exponential is the right 0.
    with np.errstate(over="ignore"):
        weights = specified_exp((values[ids] - largest) / options.temperature)
    cumulative = np.cumsum(weights)
    last = _min_p_end(weights, options.min_p, _nucleus_end(cumulative, options.top_p))
    target = uniform(options.seed, row, step) * cumulative[last]
    chosen = min(int(np.searchsorted(cumulative, target, side="right")), last)
    return int(ids[chosen])


def specified_exp(exponents: np.ndarray) -> np.ndarray:
    """The exponential function in a fixed sequence of roundings, see the specification above.

    Args:
        exponents: float64, at most 0; -inf is allowed.

    Returns:
        float64 of the same shape, between 0 and 1.
    """
    kept = exponents >= _SMALLEST_EXPONENT
    x = np.where(kept, exponents, 0.0)
    power = np.rint(x * _PER_LN2)
    rest = (x - power * _LN2_HIGH) - power * _LN2_LOW
    result = np.full_like(x, _RECIPROCAL_FACTORIALS[-1])
    for coefficient in reversed(_RECIPROCAL_FACTORIALS[:-1]):
        result *= rest
        result += coefficient
    return np.where(kept, np.ldexp(result, power.astype(np.int32)), 0.0)


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


def _penalised(logits: np.ndarray, seen: np.ndarray | None, options: SamplingOptions) -> np.ndarray:
    """The logits as float64 [vocab], those of seen tokens penalised."""
    values = np.asarray(logits).astype(np.float64)
    if seen is None or not options.penalises:
        return values
    penalty, ids = options.repetition_penalty, np.flatnonzero(seen)
    old = values[ids]
    # An overflow is an infinity, which the caller refuses where it matters.
    with np.errstate(over="ignore"):
        values[ids] = np.where(old > 0, old / penalty, old * penalty)
    return values


def _ranked_ids(values: np.ndarray, top_k: int) -> np.ndarray:
    """Ids by falling value, ties to the lower id, at most ``top_k`` of them (0: all)."""
    if not 0 < top_k < values.size:
        return np.argsort(-values, kind="stable")
    smallest_kept = np.partition(values, -top_k)[-top_k]
    candidates = np.flatnonzero(values >= smallest_kept)
    return candidates[np.argsort(-values[candidates], kind="stable")][:top_k]


def _nucleus_end(cumulative: np.ndarray, top_p: float) -> int:
    """Index of the last token of the shortest prefix that reaches ``top_p`` of the total."""
    if top_p >= 1:
        return cumulative.size - 1
    return int(np.searchsorted(cumulative, top_p * cumulative[-1], side="left"))


def _min_p_end(weights: np.ndarray, min_p: float, last: int) -> int:
    """Index of the last token before the first whose weight is below ``min_p`` of the likeliest's."""
    if min_p <= 0:
        return last
    below = np.flatnonzero(weights[: last + 1] < min_p * weights[0])
    return int(below[0]) - 1 if below.size else last
