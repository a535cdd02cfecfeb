"""Drift with the position in the window: what a longer prefix does to the difference."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from crt_export.report.plots.drawing import Plot, add_band, add_line, add_threshold, positive
from crt_export.report.svg import MUTED, add_legend, log_axis, new_plot

_MOST_LINES = 5


def plot_drift_by_passes(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """Divergence of K passes from the recurrence against prefix length, for a few of the K measured."""
    positions = data.get("positions") or {}
    edges, passes, rows = positions.get("edges") or [], positions.get("passes") or [], positions.get("kl") or []
    middles = [_middle(low, high) for low, high in itertools.pairwise(edges)]
    intervals = positions.get("kl_ci") or []
    lines = [index for index, row in enumerate(rows[: len(passes)]) if any(positive(row or []))]
    if len(lines) > _MOST_LINES:  # the ends and what lies evenly between them
        lines = sorted({lines[round(i * (len(lines) - 1) / (_MOST_LINES - 1))] for i in range(_MOST_LINES)})
    if not lines or not middles:
        return None
    figure, axes = new_plot("position in the window (tokens before it + 1)", "KL of K passes from the recurrence, nats")
    for number, index in enumerate(lines):
        add_line(axes, middles, positive(rows[index]), f"K = {passes[index]}", number)
        floor = min(value for value in positive(rows[index]) if value is not None) / 10
        add_band(axes, middles, intervals[index] if index < len(intervals) else [], number, floor=floor)
    log_axis(axes, "x")
    log_axis(axes, "y")
    _mark_trained(axes, data, edges)
    add_legend(figure, axes, columns=5)
    return Plot(
        title="Drift by position, K passes",
        caption="Divergence by prefix length, with 95 % bands; where K passes are exact there is no line.",
        figure=figure,
    )


def plot_likelihood_by_position(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """Likelihood lost against PyTorch FP32 in the same regime, by position."""
    figure, axes = new_plot("position in the window", "Δ negative log-likelihood, nats per token")
    axes.axhline(0, color=MUTED, linewidth=0.8)
    shown = 0
    for name, regime in list((data.get("regimes") or {}).items())[:_MOST_LINES]:
        buckets = regime.get("by_position") or []
        middles = bucket_middles(buckets)
        if add_line(axes, middles, [bucket.get("delta_nll") for bucket in buckets], _label(name), shown):
            add_band(axes, middles, [bucket.get("delta_nll_ci") for bucket in buckets], shown)
            shown += 1
    if not shown:
        return None
    scale_positions(axes, data)
    _plain_powers(axes)
    add_legend(figure, axes, columns=4)
    return Plot(
        title="Drift by position, likelihood",
        caption="Against PyTorch FP32 in the same regime, with 95 % bands. Zero is no loss.",
        figure=figure,
    )


def _mark_trained(axes: Any, data: Mapping[str, Any], edges: list[int]) -> None:
    trained = data.get("trained")
    if trained is not None and edges and edges[0] < trained < edges[-1]:
        add_threshold(axes, trained, "trained", vertical=True)


def _middle(low: float, high: float) -> float:
    """Of positions low to high - 1, counted from 1, on a logarithmic axis."""
    return ((low + 1) * high) ** 0.5 if high > low else low + 1


def bucket_middles(buckets: Sequence[Mapping[str, Any]]) -> list[float]:
    """Where buckets of positions are drawn: positions counted from 1, in the middle of a logarithmic axis."""
    return [_middle(bucket.get("start", 0), bucket.get("stop", 0)) for bucket in buckets]


def scale_positions(axes: Any, data: Mapping[str, Any]) -> None:
    """Logarithmic where the buckets grow with the position, as they do where the first tokens are looked at closely."""
    for regime in (data.get("regimes") or {}).values():
        widths = [bucket.get("stop", 0) - bucket.get("start", 0) for bucket in regime.get("by_position") or []]
        if widths and 0 < 8 * min(widths) <= max(widths):
            log_axis(axes, "x")
            return


def _label(name: str) -> str:
    return name.encode("ascii", "replace").decode()[:24]


def _plain_powers(axes: Any) -> None:
    """Tick labels such as 5×10⁻⁴ in place of an offset above the axis."""
    from crt_export.report.numbers import number_text

    axes.yaxis.set_major_formatter(lambda value, _: number_text(value, 2) if value else "0")
