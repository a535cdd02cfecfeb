"""Plots of corpus, chain and free running: divergence of tokens, errors of steps, agreement of continuations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crt_export.report.numbers import number_text, power_text, share_text
from crt_export.report.plots.drawing import Plot, add_band, add_line, add_threshold, known, positive
from crt_export.report.plots.positions import bucket_middles, scale_positions
from crt_export.report.svg import DASHES, SERIES, add_legend, log_axis, new_plot

_MOST_LINES = 5


def plot_histogram(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """How the tokens' divergences are distributed."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_plot("KL divergence of a token from PyTorch FP32, nats", "share of the tokens, %")
    shown, worst = 0, []
    for name, regime in list((data.get("regimes") or {}).items())[:_MOST_LINES]:
        histogram = regime.get("kl_histogram") or {}
        edges, counts = known(histogram.get("edges") or []), known(histogram.get("counts") or [])
        if len(edges) != len(counts) + 1 or not sum(counts):
            continue
        shares = [100 * count / sum(counts) for count in counts]
        label = name.encode("ascii", "replace").decode()[:24]
        used = [index for index, count in enumerate(counts) if count]
        edges, shares = edges[used[0] : used[-1] + 2], shares[used[0] : used[-1] + 1]
        if shown == 0:
            axes.stairs(shares, edges, fill=True, color=SERIES[0], alpha=0.22, linewidth=0)
        axes.stairs(shares, edges, color=SERIES[shown], linestyle=DASHES[shown], linewidth=1.4, label=label)
        largest = (regime.get("kl") or {}).get("p99")
        worst += [f"{name} {number_text(largest)}"] if isinstance(largest, int | float) else []
        shown += 1
    if not shown:
        return None
    axes.xaxis.set_major_formatter(lambda value, _: power_text(round(value)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_ylim(bottom=0)
    add_legend(figure, axes, columns=4)
    words = f" 99 % of the tokens are below, nats: {'; '.join(worst)}." if worst else ""
    return Plot(
        title="Divergence of the tokens", caption=f"Histogram over all tokens, by regime.{words}", figure=figure
    )


def plot_divergence_by_position(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """Divergence from PyTorch FP32 in the same regime, by position."""
    figure, axes = new_plot("position in the window", "mean KL from PyTorch FP32, nats")
    shown = 0
    for name, regime in list((data.get("regimes") or {}).items())[:_MOST_LINES]:
        buckets = regime.get("by_position") or []
        middles = bucket_middles(buckets)
        values = positive([bucket.get("kl") for bucket in buckets])
        if add_line(axes, middles, values, name.encode("ascii", "replace").decode()[:24], shown):
            floor = min(known(values)) / 10
            add_band(axes, middles, [bucket.get("kl_ci") for bucket in buckets], shown, floor=floor)
            shown += 1
    if not shown:
        return None
    log_axis(axes, "y")
    scale_positions(axes, data)
    add_legend(figure, axes, columns=4)
    return Plot(
        title="Drift by position, divergence",
        caption="Mean divergence from PyTorch FP32 in the same regime, with 95 % bands.",
        figure=figure,
    )


def plot_chain(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """Errors over a teacher-forced chain that feeds itself its own state: the tensors with the largest."""
    curves = [
        (curve.get("largest") or 0.0, name, positive(curve.get("by_step") or []))
        for name, curve in (data.get("tensors") or {}).items()
    ]
    curves = [curve for curve in curves if any(curve[2])]
    if not curves:
        return None
    named = [curve for curve in curves if curve[1] in ("logits", "next_state")]
    others = sorted((curve for curve in curves if curve not in named), key=lambda curve: curve[0], reverse=True)
    chosen = (named + others)[:4]
    figure, axes = new_plot("step", "largest error / largest |value|")
    for index, (_largest, name, values) in enumerate(chosen):
        label = name.encode("ascii", "replace").decode()[:32]
        add_line(axes, range(1, len(values) + 1), values, label, index, marker="")
    log_axis(axes, "y")
    add_legend(figure, axes)
    first = data.get("first_divergence")
    words = "No tensor leaves its limit." if not first else f"First beyond its limit: step {first.get('step')}."
    return Plot(
        title="Error by step of the chain",
        caption=f"The largest over the windows, of the tensors with the largest errors. {words}",
        figure=figure,
    )


def plot_agreement(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """The share of prompts whose greedy continuation is still the reference's, after n tokens."""
    agreement, length = known(data.get("agreement") or []), data.get("new_tokens") or 0
    if not agreement or not length:
        return None
    tokens = list(range(int(length) + 1))
    shares = [100 * sum(agreed >= count for agreed in agreement) / len(agreement) for count in tokens]
    figure, axes = new_plot("tokens generated", "prompts that still agree, %")
    axes.plot(tokens, shares, color=SERIES[0], drawstyle="steps-post")
    axes.fill_between(tokens, shares, step="post", color=SERIES[0], alpha=0.22, linewidth=0)
    axes.set_ylim(0, 104)
    axes.set_xlim(0, length)
    median = data.get("agreement_median")
    if isinstance(median, int | float) and 0 < median < length:
        add_threshold(axes, median, f"median {number_text(median)}", vertical=True)
    same = sum(agreed >= length for agreed in agreement)
    return Plot(
        title="Free running: agreement",
        caption=(
            f"{same} of {len(agreement)} prompts ({share_text(same / len(agreement), 0)}) are continued with the very "
            f"tokens of PyTorch FP32, {length} of them."
        ),
        figure=figure,
    )
