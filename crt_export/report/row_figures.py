"""The figures of a row of the corpus in the form of checks, so that they are judged alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Figure of a row: its interval, how it is judged, and the limit's key among those of the row's precision.
_FIGURES = {
    "delta_nll": ("delta_nll_ci", "within", "delta_nll"),
    "excess_gap": ("excess_gap_ci", "within", "gap_delta_nll"),
    "top1_agreement": ("top1_ci", "at least", "top1_agreement"),
    "relative_logit_error": ("relative_logit_error_ci", "at most", "relative_logit_error"),
    "mean_kl": ("", "at most", "mean_kl"),
    "max_abs_logit_error": ("", "at most", "max_abs_logit_error"),
    "inconsistency": ("", "at most", "consistency"),
}
#: A cost in nats says nothing about a model that predicts the text worse than a guess.
_NEED_A_FIT = ("delta_nll", "mean_kl", "perplexity")


def row_name(row: Mapping[str, Any]) -> str:
    """What a row is, unique within its target: ``step 0-256 (step)``, with its status where it did not run."""
    span = "{}-{}".format(*row["positions"]) if row["positions"] else ""
    status = "" if row["status"] == "run" else row["status"]
    return " ".join(filter(None, (row["regime"], span, f"({row['graph']})", status)))


def figures_of_row(row: Mapping[str, Any], tolerances: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every figure of a row with its interval and limit, as a check of a level would have it.

    Args:
        row: A row of a report, as JSON.
        tolerances: The report's limits.

    Returns:
        By figure; ``passed`` is None for a figure that gates nothing in this row. ``result`` is the row's own verdict.
    """
    limits = tolerances.get(row["precision"])
    limits = limits if isinstance(limits, Mapping) else {}
    regime_gap = row["regime"] == "regime-gap"
    figures = {"result": _check(None, None, "at most", None, row["passed"], row["failures"])}
    for name, (interval, relation, key) in _FIGURES.items():
        gated = row["passed"] is not None and not (name in _NEED_A_FIT and row["better_than_chance"] is not True)
        limit = None if regime_gap and name == "delta_nll" else limits.get(key)
        figures[name] = _check(row[name], row[interval] if interval else None, relation, limit, gated or None)
    perplexity, interval, difference = row["perplexity"], row["delta_nll_ci"], row["delta_nll"]
    known = None not in (perplexity, difference, *(interval or (None,)))
    ends = [perplexity * (1 + end - difference) for end in interval] if known else None
    fits = row["passed"] is not None and row["better_than_chance"] is True
    limit = limits["delta_nll"] * perplexity if perplexity is not None and limits.get("delta_nll") else None
    figures["perplexity"] = _check(perplexity, ends, "at most", limit, fits or None)
    return figures


def _check(
    value: float | None, interval: Any, relation: str, limit: float | None, passed: bool | None, failures: Any = ()
) -> dict[str, Any]:
    return {
        "value": value,
        "interval": interval,
        "relation": relation,
        "limit": limit,
        "passed": passed,
        "failures": failures,
    }
