"""Plots of what was decoded: divergence and likelihood of tokens, errors of steps, agreement, long run, headroom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from crt_export.report.numbers import interval_text, number_text, power_text, share_text
from crt_export.report.plots.certificate import MOST_LINES, position_middle
from crt_export.report.svg import (
    DASHES,
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
    set_margins,
)

_TOKENS = "tokens decoded"


# --- regimes on the text
def plot_histogram(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """How the tokens' divergences are distributed."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_plot("KL divergence of a token from PyTorch FP32, nats", "share of the tokens, %")
    shown, worst = 0, []
    for name, regime in _regimes(data):
        histogram = regime.get("kl_histogram") or {}
        edges, counts = known(histogram.get("edges") or []), known(histogram.get("counts") or [])
        if len(edges) != len(counts) + 1 or not sum(counts):
            continue
        used = [index for index, count in enumerate(counts) if count]
        edges = edges[used[0] : used[-1] + 2]
        shares = [100 * count / sum(counts) for count in counts[used[0] : used[-1] + 1]]
        if shown == 0:
            axes.stairs(shares, edges, fill=True, color=SERIES[0], alpha=0.22, linewidth=0)
        axes.stairs(shares, edges, color=SERIES[shown], linestyle=DASHES[shown], linewidth=1.4, label=_label(name))
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


def plot_likelihood_by_position(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """Likelihood lost against PyTorch FP32 in the same regime, by position."""

    def finish(axes: Any) -> None:
        axes.axhline(0, color=MUTED, linewidth=0.8)
        # Tick labels such as 5×10⁻⁴ in place of an offset above the axis.
        axes.yaxis.set_major_formatter(lambda value, _: number_text(value, 2) if value else "0")

    return _by_position(
        data,
        ("delta_nll", "Δ negative log-likelihood, nats per token"),
        ("Drift by position, likelihood", "Against PyTorch FP32 in the same regime, with 95 % bands. Zero is no loss."),
        finish,
    )


def plot_divergence_by_position(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """Divergence from PyTorch FP32 in the same regime, by position."""
    return _by_position(
        data,
        ("kl", "mean KL from PyTorch FP32, nats"),
        ("Drift by position, divergence", "Mean divergence from PyTorch FP32 in the same regime, with 95 % bands."),
        lambda axes: log_axis(axes, "y"),
        only_positive=True,
    )


def _by_position(
    data: Mapping[str, Any],
    figure_of: tuple[str, str],
    words: tuple[str, str],
    finish: Callable[[Any], None],
    *,
    only_positive: bool = False,
) -> Plot | None:
    """A line with its band for each regime.

    Args:
        data: Of the corpus level.
        figure_of: Key of the figure in a bucket, and the label of its axis.
        words: Title and caption.
        finish: Sets the vertical axis, after the lines.
        only_positive: The axis will be logarithmic.
    """
    key, label = figure_of
    figure, axes = new_plot("position in the window", label)
    shown = 0
    for name, regime in _regimes(data):
        buckets = regime.get("by_position") or []
        middles = [position_middle(bucket.get("start", 0), bucket.get("stop", 0)) for bucket in buckets]
        values = [bucket.get(key) for bucket in buckets]
        values = positive(values) if only_positive else values
        if add_line(axes, middles, values, _label(name), shown):
            floor = min(known(values)) / 10 if only_positive else None
            add_band(axes, middles, [bucket.get(f"{key}_ci") for bucket in buckets], shown, floor=floor)
            shown += 1
    if not shown:
        return None
    finish(axes)
    _scale_positions(axes, data)
    add_legend(figure, axes, columns=4)
    return Plot(title=words[0], caption=words[1], figure=figure)


def _scale_positions(axes: Any, data: Mapping[str, Any]) -> None:
    """Logarithmic where the buckets grow with the position, as they do where the first tokens are looked at closely."""
    for regime in (data.get("regimes") or {}).values():
        widths = [bucket.get("stop", 0) - bucket.get("start", 0) for bucket in regime.get("by_position") or []]
        if widths and 0 < 8 * min(widths) <= max(widths):
            log_axis(axes, "x")
            return


def _regimes(data: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """As many as a plot can hold apart."""
    return list((data.get("regimes") or {}).items())[:MOST_LINES]


def _label(name: str, most: int = 24) -> str:
    return name.encode("ascii", "replace").decode()[:most]


# --- chain and free running
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
    figure, axes = new_plot("step", "largest error / largest |value|")
    for index, (_largest, name, values) in enumerate((named + others)[:4]):
        add_line(axes, range(1, len(values) + 1), values, _label(name, 32), index, marker="")
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


# --- the long run
def plot_error_growth(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """The error of every block of the runs."""
    figure, axes = new_plot(_TOKENS, "mean |logit error| / standard deviation of the logits")
    rates = []
    for index, (run, middles) in enumerate(_runs(data, "relative_error")):
        add_line(axes, middles, positive(_of_blocks(run, "relative_error")), _run_name(run), index, marker="")
        growth = run.get("growth") or {}
        if growth.get("per_1000_tokens") is not None:
            rate = f"{number_text(growth['per_1000_tokens'])} {interval_text(growth.get('ci'))}".strip()
            rates.append(f"{_run_name(run)} {rate}")
    words = f" Growth per 1,000 tokens with its 95 % interval: {'; '.join(rates)}." if rates else ""
    return _run_plot(
        (figure, axes), data, "Error over the long run", f"Block by block, teacher-forced.{words}", "relative_error"
    )


def plot_state_norm(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """The norm of the state against that of the reference."""
    figure, axes = new_plot(_TOKENS, "mean norm of the state h")
    for index, (run, middles) in enumerate(_runs(data, "state_norm")):
        add_line(axes, middles, _of_blocks(run, "state_norm"), _run_name(run), index, marker="")
    label = "PyTorch FP32"
    for run, middles in _runs(data, "reference_state_norm"):
        reference = _of_blocks(run, "reference_state_norm")
        add_line(axes, middles, reference, label, 2, marker="", color=INK, linewidth=0.8)
        label = "_nolegend_"
    caption = "The recurrent state over the long run; where the lines coincide the target neither grows nor fades."
    return _run_plot((figure, axes), data, "Norm of the state", caption, "state_norm")


def _run_plot(drawn: tuple[Any, Any], data: Mapping[str, Any], title: str, caption: str, key: str) -> Plot | None:
    """The axes that plots over the tokens of the runs have in common; None where no run has the figure."""
    figure, axes = drawn
    if not list(_runs(data, key)):
        return None
    if key == "relative_error":
        log_axis(axes, "y")
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for run in data.get("runs") or []:  # where the one uninterrupted run leaves the training length
        trained, tokens = run.get("trained"), run.get("tokens") or 0
        if run.get("kind") == "single" and trained is not None and 0 < trained < tokens:
            add_threshold(axes, trained, "trained", vertical=True)
    add_legend(figure, axes, columns=1)
    return Plot(title=title, caption=caption, figure=figure)


def plot_headroom(data: Mapping[str, Any], tolerances: Mapping[str, Any]) -> Plot | None:
    """The largest value of every layer, against what FP16 may come to."""
    largest: dict[str, float] = {}
    for run in data.get("runs") or []:
        for name, value in (run.get("headroom_by_layer") or {}).items():
            if value is not None and value > 0:
                largest[name] = max(value, largest.get(name, 0.0))
    if not largest:
        return None
    chosen = sorted(largest, key=lambda name: largest[name], reverse=True)[:12]
    names = [name for name in largest if name in chosen]
    labels = [_label(name, 22) for name in names]
    figure, axes = new_plot("largest |value| over the run", "layer")
    axes.barh(range(len(names)), [largest[name] for name in names], color=SERIES[0], alpha=0.75, height=0.6)
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()
    set_margins(figure, left=12 + 5.6 * max(map(len, labels)))
    axes.grid(visible=False, axis="y")
    log_axis(axes, "x")
    limit = tolerances.get("fp16_headroom")
    if isinstance(limit, int | float) and limit > 0:
        add_threshold(axes, limit, "limit", vertical=True)
        axes.set_xlim(right=limit * 4)
    return Plot(
        title="FP16 headroom by layer",
        caption=(
            f"The largest value is {number_text(max(largest.values()))}; FP16 ends at 65,504. The bars' axis is "
            "logarithmic."
        ),
        figure=figure,
    )


def _runs(data: Mapping[str, Any], key: str) -> Iterator[tuple[Mapping[str, Any], list[float]]]:
    """The runs that have a figure that can be shown, each with the middles of its blocks."""
    for run in data.get("runs") or []:
        blocks = run.get("blocks") or []
        values = [block.get(key) for block in blocks]
        if known(positive(values) if key == "relative_error" else values):
            yield run, [(block.get("start", 0) + block.get("stop", 0)) / 2 for block in blocks]


def _of_blocks(run: Mapping[str, Any], key: str) -> list[float | None]:
    return [block.get(key) for block in run["blocks"]]


def _run_name(run: Mapping[str, Any]) -> str:
    kind = {"single": "one run", "chained": "chained windows"}.get(run.get("kind", ""), "run")
    return f"{kind} of {number_text(run.get('tokens'))} tokens"
