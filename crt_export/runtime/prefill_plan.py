"""How prompts are taken: what a target does of its own accord, and what a call asks for.

Token by token is the exact recurrence. K parallel passes over a chunk are an iteration towards it, exact with as many
passes as the chunk has tokens. The adaptive method goes on with passes until the residual, the largest change of h in a
pass, is at most a bound that the build tied to a gap in perplexity.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from crt_export.errors import InputError, UnsupportedError
from crt_export.runtime.counts import plain_int, shown, whole_number

STEPS = "steps"
PASSES = "passes"
ADAPTIVE = "adaptive"
#: What a caller asks for to have the recurrence.
EXACT = "exact"
WORDS = (ADAPTIVE, EXACT)
_LARGEST_BOUND = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class PrefillPlan:
    """What a target does where the caller leaves it the choice.

    Attributes:
        method: ``steps``, ``passes`` or ``adaptive``.
        passes: K of ``passes``, most passes of a chunk with ``adaptive``; None: those that the bundle was built with,
            one for a plain transformer.
        chunk: Most tokens of a chunk; None: the target's limit.
        shortest: A chunk of fewer tokens goes token by token, which is exact, and as fast for so few.
        residual_bound: Residual at which ``adaptive`` stops; None where none is known.
        perplexity_gap: What stopping there cost at most in perplexity, upper end of a 95 % interval; None: not known.
    """

    method: str = PASSES
    passes: int | None = None
    chunk: int | None = None
    shortest: int = 1
    residual_bound: float | None = None
    perplexity_gap: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry of a target in the manifest."""
        return {
            "method": self.method,
            "passes": self.passes or 1,
            "chunk": self.chunk,
            "shortest": self.shortest,
            "residual_bound": self.residual_bound,
            "perplexity_gap": self.perplexity_gap,
        }


@dataclass(frozen=True, kw_only=True)
class PrefillRule:
    """How one call runs.

    Attributes:
        passes: Most passes of a chunk; None: those that the bundle was built with.
        bound: Residual at which a chunk is done; None: after all passes.
        shortest: Chunks of fewer tokens go token by token.
        chunk: Most tokens of a chunk.
    """

    passes: int | None
    bound: float | None
    shortest: int
    chunk: int


def plan_from_entry(entry: Mapping[str, Any], *, recurrent: bool) -> PrefillPlan:
    """The plan of a target's entry in the manifest; bundles of earlier versions have none and take passes.

    Args:
        entry: The target's entry, checked.
        recurrent: Whether the model has passes at all.
    """
    if "prefill" not in entry or not recurrent:
        return PrefillPlan()
    return PrefillPlan(**{key: entry["prefill"][key] for key in PrefillPlan().to_dict()})


def prefill_rule(
    plan: PrefillPlan,
    passes: int | str | None,
    chunk: int | None,
    *,
    most: int,
    recurrent: bool,
    unroll: int | None,
    target: str,
) -> PrefillRule:
    """What a call comes to.

    Args:
        plan: The target's own choice.
        passes: A number of passes, ``adaptive``, ``exact``, or None for the plan.
        chunk: Most tokens of a chunk, or None.
        most: Most tokens that a call of the engine takes.
        recurrent: Whether the model has passes at all.
        unroll: Passes that the target was built with, which every target can make.
        target: Its name, for messages.

    Raises:
        InputError: Neither a count of at least 1 nor a word that is known, or a chunk out of range.
        UnsupportedError: Passes of a plain transformer; ``adaptive`` where no bound is known.
    """
    word = passes_word(passes)
    number = whole_number("passes", passes) if word is None and passes is not None else None  # type: ignore[arg-type]
    if not recurrent and (number is not None or word == ADAPTIVE):
        raise UnsupportedError("passes: a plain transformer has exactly one pass, which is exact; leave passes out")
    if word == ADAPTIVE and plan.residual_bound is None:
        raise UnsupportedError(
            f"{target} has no bound for the residual, so there is no telling when passes may stop: its bundle was "
            "built without a text that the model predicts, or by an earlier version; give a number of passes or 'exact'"
        )
    own = plan.chunk if number is None and word != EXACT else None
    size = min(own or most, most) if chunk is None else whole_number("chunk", chunk, most=most)
    if number is not None:
        return PrefillRule(passes=None if number == unroll else number, bound=None, shortest=1, chunk=size)
    if recurrent and (word == EXACT or (word is None and plan.method == STEPS)):
        return PrefillRule(passes=None, bound=None, shortest=sys.maxsize, chunk=size)
    shortest = plan.shortest if recurrent else 1
    if plan.residual_bound is not None and ADAPTIVE in (word, plan.method):
        # Residuals are float32, and so is what they are compared with.
        bound = float(np.float32(min(plan.residual_bound, _LARGEST_BOUND)))
        return PrefillRule(passes=plan.passes or unroll or 1, bound=bound, shortest=shortest, chunk=size)
    # Those that it was built with, the unrolled graph makes in one call.
    return PrefillRule(passes=None if plan.passes == unroll else plan.passes, bound=None, shortest=shortest, chunk=size)


def passes_word(passes: object) -> str | None:
    """The word among the values that ``passes`` may take; None for anything that is not text.

    Raises:
        InputError: Another word.
    """
    if not isinstance(passes, str):
        return None
    if passes not in WORDS:
        raise InputError(f"passes must be a number, 'adaptive' or 'exact', found {shown(passes)}")
    return passes


def passes_problems(passes: object) -> tuple[int | str | None, list[str]]:
    """The plain value of an option, and what is wrong with it."""
    if passes is None or (isinstance(passes, str) and passes in WORDS):
        return passes, []
    number = plain_int(passes)
    if number is not None and number >= 1:
        return number, []
    wanted = "at least 1, 'adaptive' or 'exact' (None: the target's own choice)"
    return number, [f"passes must be {wanted}, found {shown(passes)}"]
