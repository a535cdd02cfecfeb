"""How much of its limit a check uses up: what is worth looking at first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def nearness(check: Mapping[str, Any]) -> float:
    """The share of its limit that a check uses up: 1 is at the limit, above 1 beyond it.

    Args:
        check: A check of a report, as JSON.

    Returns:
        0 where nothing is measured or nothing is held against it; infinity for a failure without a figure. Of a share
        that must be at least the limit, what counts is how much of what may be missing is missing; a count, such as the
        tokens that were asked for, is there or is not.
    """
    value, interval, limit = check["value"], check["interval"], check["limit"]
    if limit is None or not limit or (value is None and not interval):
        return math.inf if check["passed"] is False else 0.0
    if check["relation"] == "within":
        ends = [abs(end) for end in interval or [value] if end is not None]
        return max(ends, default=math.inf) / limit
    if value is None:
        return math.inf if check["passed"] is False else 0.0
    if check["relation"] == "at least":
        if limit < 1:
            return (1 - value) / (1 - limit)
        return 0.0 if value >= limit else math.inf
    return value / limit
