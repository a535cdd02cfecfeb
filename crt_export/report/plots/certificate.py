"""The certificate's curves over the number of passes K: perplexity, gap, drift, residual, handover."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from crt_export.report.numbers import number_text
from crt_export.report.svg import (
    GOOD,
    INK,
    MUTED,
    SERIES,
    Plot,
    add_band,
    add_legend,
    add_line,
    add_threshold,
    known,
    log_axis,
    new_plot,
    positive,
    symlog_axis,
)

#: Lines that one plot can hold apart.
MOST_LINES = 5
_PASSES = "passes K"


def plot_perplexity(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """Perplexity by K with its band, the recurrence as a horizontal line, and the same of PyTorch FP32."""
    passes, spans = data.get("passes") or [], _with_curve(data.get("spans"), "perplexity")
    if not passes or not spans:
        return None
    figure, axes = new_plot(_PASSES, "perplexity")
    sequential = []
    for index, span in enumerate(spans):
        level = span.get("sequential_perplexity")
        add_line(axes, passes, positive(span["perplexity"]), f"K passes, {_span_name(span)}", index)
        if level is not None and level > 0:
            sequential.append(f"{number_text(level, 4)} at {_span_name(span)}")
            shifted = [_shifted(interval, level) for interval in span.get("perplexity_gap_ci") or []]
            add_band(axes, passes, shifted, index, floor=level / 100)
            axes.axhline(level, color=SERIES[index % len(SERIES)], linewidth=0.9, linestyle=(0, (2, 2)))
    for number, span in enumerate((data.get("reference") or {}).get("spans") or []):
        label = "PyTorch FP32" if number == 0 else "_nolegend_"
        add_line(axes, passes, positive(span.get("perplexity") or []), label, 4, color=INK, marker="", linewidth=0.7)
    log_axis(axes, "y")
    _whole_passes(axes)
    add_legend(figure, axes, columns=1)
    return Plot(
        title="Perplexity by number of passes",
        caption=(
            "K parallel passes against the exact recurrence (dotted line), with 95 % bands. The recurrence has "
            f"perplexity {'; '.join(sequential)}."
        ),
        figure=figure,
    )


def plot_gap(data: Mapping[str, Any], tolerances: Mapping[str, Any]) -> Plot | None:
    """The perplexity gap with its interval against the bound that a reader would call equal."""
    passes, spans = (
        data.get("passes") or [],
        [span for span in data.get("spans") or [] if known(span.get("perplexity_gap") or [])],
    )
    if not passes or not spans:
        return None
    bound = tolerances.get("perplexity_gap")
    bound = bound if isinstance(bound, int | float) and bound > 0 else 0.01
    figure, axes = new_plot(_PASSES, "perplexity of K passes − perplexity of the recurrence")
    axes.axhspan(-bound, bound, color=GOOD, alpha=0.13, linewidth=0)
    found = []
    for index, span in enumerate(spans):
        add_line(axes, passes, span["perplexity_gap"], _span_name(span), index)
        add_band(axes, passes, span.get("perplexity_gap_ci") or [], index)
        smallest = span.get("smallest_passes")
        words = f"K = {smallest}" if smallest is not None else "no K measured here"
        found.append(f"{words} at {_span_name(span)}")
    symlog_axis(axes, "y", bound)
    _whole_passes(axes)
    add_legend(figure, axes)
    caption = (
        f"Shaded: |gap| ≤ {number_text(bound)}, linear there and logarithmic beyond. The smallest K that holds it with "
        f"95 % confidence: {'; '.join(found)}."
    )
    return Plot(title="Regime gap by number of passes", caption=caption, figure=figure)


def plot_drift_by_passes(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """Divergence of K passes from the recurrence against prefix length, for a few of the K measured."""
    positions = data.get("positions") or {}
    edges, passes, rows = positions.get("edges") or [], positions.get("passes") or [], positions.get("kl") or []
    middles = [position_middle(low, high) for low, high in itertools.pairwise(edges)]
    intervals = positions.get("kl_ci") or []
    lines = [index for index, row in enumerate(rows[: len(passes)]) if any(positive(row or []))]
    if len(lines) > MOST_LINES:  # the ends and what lies evenly between them
        lines = sorted({lines[round(i * (len(lines) - 1) / (MOST_LINES - 1))] for i in range(MOST_LINES)})
    if not lines or not middles:
        return None
    figure, axes = new_plot("position in the window (tokens before it + 1)", "KL of K passes from the recurrence, nats")
    for number, index in enumerate(lines):
        add_line(axes, middles, positive(rows[index]), f"K = {passes[index]}", number)
        floor = min(value for value in positive(rows[index]) if value is not None) / 10
        add_band(axes, middles, intervals[index] if index < len(intervals) else [], number, floor=floor)
    log_axis(axes, "x")
    log_axis(axes, "y")
    trained = data.get("trained")
    if trained is not None and edges and edges[0] < trained < edges[-1]:
        add_threshold(axes, trained, "trained", vertical=True)
    add_legend(figure, axes, columns=5)
    return Plot(
        title="Drift by position, K passes",
        caption="Divergence by prefix length, with 95 % bands; where K passes are exact there is no line.",
        figure=figure,
    )


def plot_residual(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """The residual that a runtime can see against the error that it cannot."""
    rows = [
        row for row in data.get("residual") or [] if (row.get("residual_median") or 0) > 0 and row.get("error_median")
    ]
    if not rows:
        return None
    figure, axes = new_plot("residual: largest change of h in the last pass", "true error: |h − h of the recurrence|")
    residuals = [row["residual_median"] for row in rows]
    axes.plot([min(residuals), max(residuals)], [min(residuals), max(residuals)], color=MUTED, linewidth=0.8,
              linestyle=(0, (2, 2)), label="error = residual")  # fmt: skip
    add_line(axes, residuals, positive([row["error_median"] for row in rows]), "median", 0)
    add_line(axes, residuals, positive([row.get("error_max") for row in rows]), "largest", 1, linestyle="none")
    log_axis(axes, "x")
    log_axis(axes, "y")
    apart = residuals[0] > 5 * residuals[-1]
    for row in (rows[0], rows[-1]) if apart else rows[:1]:
        axes.annotate(
            f"K={row['passes']}", (row["residual_median"], row["error_median"]), xytext=(-3, -10), fontsize=8.5,
            textcoords="offset points", color=MUTED, ha="right" if row is rows[0] else "left",
        )  # fmt: skip
    add_legend(figure, axes, columns=3)
    correlations = known(row.get("correlation") for row in rows)
    words = f" Correlation over windows, median over K: {number_text(_middle(correlations))}." if correlations else ""
    return Plot(
        title="Residual against true error",
        caption=f"One point per K. Points on the dotted line: the residual is the error.{words}",
        figure=figure,
    )


def plot_handover(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """What decoding loses when it continues from K passes."""
    handover = data.get("handover") or {}
    passes, deltas = handover.get("passes") or [], handover.get("delta_nll") or []
    figure, axes = new_plot("passes K before decoding continues", "Δ negative log-likelihood, nats per token")
    axes.axhline(0, color=MUTED, linewidth=0.8)
    if not add_line(axes, passes, deltas, "delta", 0):
        return None
    add_band(axes, passes, handover.get("delta_nll_ci") or [], 0)
    _whole_passes(axes)
    ends = sorted(abs(end) for interval in handover.get("delta_nll_ci") or [] for end in known(interval or []))
    # Linear up to a power of ten about as wide as most intervals, so that the axis shows where zero lies among them.
    typical = ends[len(ends) // 2] if ends else 0.0
    symlog_axis(axes, "y", 10.0 ** math.floor(math.log10(typical)) if typical > 1e-12 else 1e-12)
    states = known(handover.get("max_state_error") or [])
    words = f" Largest state error at the last K: {number_text(states[-1])}." if states else ""
    return Plot(
        title="Handover from K passes to decoding",
        caption=f"Steps after a K-pass prefill against steps after the recurrence, 95 % band.{words}",
        figure=figure,
    )


def _with_curve(spans: Any, key: str) -> list[Mapping[str, Any]]:
    """Spans whose curve has anything that a logarithmic axis can show."""
    return [span for span in spans or [] if known(positive(span.get(key) or []))]


def _shifted(interval: Any, by: float) -> tuple[float, float] | None:
    if interval is None or None in interval:
        return None
    return interval[0] + by, interval[1] + by


def _whole_passes(axes: Any) -> None:
    """No tick between two whole numbers of passes."""
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _span_name(span: Mapping[str, Any]) -> str:
    return f"positions {span.get('start', 0)}–{span.get('stop', 0)}"


def position_middle(low: float, high: float) -> float:
    """The middle of positions low to high - 1, counted from 1, on a logarithmic axis."""
    return ((low + 1) * high) ** 0.5 if high > low else low + 1
