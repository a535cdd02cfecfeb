"""The plots of a benchmark: steps against their floor, ratios, time to first token, the memory's read rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crt_export.report.bench_page import prefill_method, ratio_place
from crt_export.report.numbers import number_text
from crt_export.report.plots import DrawnPlot
from crt_export.report.plots.drawing import Plot, add_line, add_threshold
from crt_export.report.svg import GOOD, INK, SERIES, add_legend, log_axis, new_plot, plot_style, set_margins
from crt_export.report.svg import svg_from_figure as _svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES_WIDTH = 132  # room for names left of the axes, in the units of svg.py
_LONGEST_NAME = 22


def draw_bench_plots(document: Mapping[str, Any], identity: str) -> list[DrawnPlot]:
    """Every plot that a benchmark has data for.

    Args:
        document: The benchmark.
        identity: Unique within the page, letters, digits and hyphens.
    """
    draw: tuple[Callable[[Mapping[str, Any]], Plot | None], ...] = (
        plot_steps,
        plot_ratios,
        plot_prompts,
        plot_bandwidth,
    )
    drawn = []
    with plot_style():
        for number, function in enumerate(draw):
            plot = function(document)
            if plot is not None:
                svg = _svg(plot.figure, identity=f"{identity}-{number}", title=plot.title, description=plot.caption)
                drawn.append(DrawnPlot(title=plot.title, caption=plot.caption, svg=svg))
    return drawn


def plot_steps(document: Mapping[str, Any]) -> Plot | None:
    """One row a candidate and position: 10th to 90th percentile, median, and the floor."""
    steps = [(who["name"], step) for who in document["candidates"] for step in who["step"]]
    if not steps:
        return None
    several = len({step["position"] for _name, step in steps}) > 1
    figure, axes = new_plot("milliseconds a token", "")
    names = []
    for row, (name, step) in enumerate(steps):
        color = SERIES[row % len(SERIES)]
        axes.plot([step["p10_ms"], step["p90_ms"]], [row, row], color=color, linewidth=4, alpha=0.3)
        axes.plot([step["p50_ms"]], [row], color=color, marker="o", linestyle="", markersize=5)
        if step["floor_ms"] is not None:
            axes.plot([step["floor_ms"]], [row], color=GOOD, marker="|", linestyle="", markersize=14, mew=2)
        names.append(_shortened(name) + (f", {step['position']}" if several else ""))
    _named_rows(axes, names)
    log_axis(axes, "x")
    set_margins(figure, left=_NAMES_WIDTH)
    caption = (
        "One step: the median as a point, the 10th to 90th percentile as a bar, and as an upright line the floor: the "
        "bytes a step has to move, at the 90th percentile of the read rate that was sampled in the same rounds."
    )
    caption += " After the name the tokens in the cache." if several else ""
    return Plot(title="Step and floor", caption=caption, figure=figure)


def plot_ratios(document: Mapping[str, Any]) -> Plot | None:
    """One row a comparison, with its interval."""
    ratios = document["ratios"]
    if not ratios:
        return None
    figure, axes = new_plot("times as long as the target", "")
    for row, ratio in enumerate(ratios):
        color = SERIES[row % len(SERIES)]
        axes.plot([ratio["low"], ratio["high"]], [row, row], color=color, linewidth=2)
        axes.plot([ratio["ratio"]], [row], color=color, marker="o", linestyle="", markersize=5)
    _named_rows(axes, [f"{_shortened(ratio['against'])}, {ratio_place(ratio)}" for ratio in ratios])
    log_axis(axes, "x")
    low, high = axes.get_xlim()
    if low <= 1 <= high:
        add_threshold(axes, 1.0, "equal", vertical=True)
    set_margins(figure, left=_NAMES_WIDTH)
    caption = "How many times longer each took than the target, round by round, with the 95 % interval over rounds."
    return Plot(title="Against others", caption=caption, figure=figure)


def plot_prompts(document: Mapping[str, Any]) -> Plot | None:
    """Time to first token over the length of the prompt, a line for each candidate and method."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for who in document["candidates"]:
        for prompt in who["prefill"]:
            label = f"{_shortened(who['name'])}, {prefill_method(prompt)}"
            lines.setdefault(label, []).append((prompt["tokens"], prompt["p50_s"]))
    if not lines:
        return None
    figure, axes = new_plot("tokens of the prompt", "seconds to the first token")
    for index, (label, points) in enumerate(lines.items()):
        tokens, seconds = zip(*sorted(points), strict=True)
        add_line(axes, tokens, seconds, label, index)
    for which in ("x", "y"):
        log_axis(axes, which)
    add_legend(figure, axes, columns=1)
    caption = "From an empty cache to the logits after the prompt, the median of the rounds."
    return Plot(title="Time to first token", caption=caption, figure=figure)


def plot_bandwidth(document: Mapping[str, Any]) -> Plot | None:
    """The read rate over the run: how steady the machine was."""
    rates = (document["bandwidth"] or {}).get("read_gb_s")
    if not rates or not rates["samples"]:
        return None
    figure, axes = new_plot("sample", "GB/s read from memory")
    samples = rates["samples"]
    axes.plot(range(1, len(samples) + 1), samples, color=SERIES[0], linestyle="", marker=".", markersize=4)
    axes.set_ylim(bottom=0)
    add_threshold(axes, rates["p90"], f"90th percentile {number_text(rates['p90'])}")
    axes.axhline(rates["p50"], color=INK, linewidth=0.6)
    caption = (
        f"Sampled in turns with the steps: from {number_text(rates['p10'])} (10th percentile) over "
        f"{number_text(rates['p50'])} (median, the thin line) to {number_text(rates['p90'])}."
    )
    return Plot(title="Memory's read rate", caption=caption, figure=figure)


def _named_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
