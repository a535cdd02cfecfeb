"""The long run: error growth, the norm of the state, and how close FP16 comes to its largest value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from crt_export.report.numbers import interval_text, number_text
from crt_export.report.plots.drawing import Plot, add_line, add_threshold, positive
from crt_export.report.svg import INK, SERIES, add_legend, log_axis, new_plot, set_margins

_TOKENS = "tokens decoded"


def plot_error_growth(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """The error of every block of the runs."""
    figure, axes = new_plot(_TOKENS, "mean |logit error| / standard deviation of the logits")
    shown, rates = 0, []
    for run, middles in _runs(data):
        values = positive([block.get("relative_error") for block in run["blocks"]])
        if add_line(axes, middles, values, _name(run), shown, marker=""):
            shown += 1
            growth = run.get("growth") or {}
            if growth.get("per_1000_tokens") is not None:
                rate = f"{number_text(growth['per_1000_tokens'])} {interval_text(growth.get('ci'))}".strip()
                rates.append(f"{_name(run)} {rate}")
    if not shown:
        return None
    log_axis(axes, "y")
    _few_ticks(axes)
    _mark_trained(axes, data)
    add_legend(figure, axes, columns=1)
    words = f" Growth per 1,000 tokens with its 95 % interval: {'; '.join(rates)}." if rates else ""
    return Plot(title="Error over the long run", caption=f"Block by block, teacher-forced.{words}", figure=figure)


def plot_state_norm(data: Mapping[str, Any], _: Mapping[str, Any]) -> Plot | None:
    """The norm of the state against that of the reference."""
    figure, axes = new_plot(_TOKENS, "mean norm of the state h")
    shown = 0
    for run, middles in _runs(data):
        values = [block.get("state_norm") for block in run["blocks"]]
        if add_line(axes, middles, values, _name(run), shown, marker=""):
            shown += 1
    if not shown:
        return None
    label = "PyTorch FP32"
    for run, middles in _runs(data):
        reference = [block.get("reference_state_norm") for block in run["blocks"]]
        if add_line(axes, middles, reference, label, 2, marker="", color=INK, linewidth=0.8):
            label = "_nolegend_"
    _few_ticks(axes)
    _mark_trained(axes, data)
    add_legend(figure, axes, columns=1)
    return Plot(
        title="Norm of the state",
        caption="The recurrent state over the long run; where the lines coincide the target neither grows nor fades.",
        figure=figure,
    )


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
    figure, axes = new_plot("largest |value| over the run", "layer")
    axes.barh(range(len(names)), [largest[name] for name in names], color=SERIES[0], alpha=0.75, height=0.6)
    axes.set_yticks(range(len(names)), [name.encode("ascii", "replace").decode()[:22] for name in names])
    axes.invert_yaxis()
    set_margins(figure, left=12 + 5.6 * max(min(len(name), 22) for name in names))
    axes.grid(visible=False, axis="y")
    log_axis(axes, "x")
    limit = tolerances.get("fp16_headroom")
    if isinstance(limit, int | float) and limit > 0:
        add_threshold(axes, limit, "limit", vertical=True)
        axes.set_xlim(right=limit * 4)
    worst = max(largest.values())
    return Plot(
        title="FP16 headroom by layer",
        caption=f"The largest value is {number_text(worst)}; FP16 ends at 65,504. The bars' axis is logarithmic.",
        figure=figure,
    )


def _runs(data: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], list[float]]]:
    for run in data.get("runs") or []:
        blocks = run.get("blocks") or []
        if blocks:
            yield run, [(block.get("start", 0) + block.get("stop", 0)) / 2 for block in blocks]


def _name(run: Mapping[str, Any]) -> str:
    kind = {"single": "one run", "chained": "chained windows"}.get(run.get("kind", ""), "run")
    return f"{kind} of {number_text(run.get('tokens'))} tokens"


def _few_ticks(axes: Any) -> None:
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _mark_trained(axes: Any, data: Mapping[str, Any]) -> None:
    """Where the one uninterrupted run leaves the training length."""
    for run in data.get("runs") or []:
        trained, tokens = run.get("trained"), run.get("tokens") or 0
        if run.get("kind") == "single" and trained is not None and 0 < trained < tokens:
            add_threshold(axes, trained, "trained", vertical=True)
