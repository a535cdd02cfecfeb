"""The plots of a report: one function per curve of a level, each with what it shows in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crt_export.parity.levels import CERTIFICATE, CHAIN, CORPUS, FREE_RUNNING, LONG_RUN
from crt_export.parity.report import LevelResult
from crt_export.report.plots.drawing import Plot
from crt_export.report.plots.passes import plot_gap, plot_handover, plot_perplexity, plot_residual
from crt_export.report.plots.positions import plot_drift_by_passes, plot_likelihood_by_position
from crt_export.report.plots.run import plot_error_growth, plot_headroom, plot_state_norm
from crt_export.report.plots.text import plot_agreement, plot_chain, plot_divergence_by_position, plot_histogram
from crt_export.report.svg import plot_style, svg_from_figure

__all__ = ["DrawnPlot", "Plot", "draw_plots"]

Draw = Callable[[Mapping[str, Any], Mapping[str, Any]], Plot | None]
#: In the order they are shown.
_PLOTS: tuple[tuple[str, Draw], ...] = (
    (CERTIFICATE, plot_perplexity),
    (CERTIFICATE, plot_gap),
    (CERTIFICATE, plot_drift_by_passes),
    (CERTIFICATE, plot_residual),
    (CERTIFICATE, plot_handover),
    (CORPUS, plot_histogram),
    (CORPUS, plot_likelihood_by_position),
    (CORPUS, plot_divergence_by_position),
    (CHAIN, plot_chain),
    (FREE_RUNNING, plot_agreement),
    (LONG_RUN, plot_error_growth),
    (LONG_RUN, plot_state_norm),
    (LONG_RUN, plot_headroom),
)


@dataclass(frozen=True, kw_only=True)
class DrawnPlot:
    """A plot for the page: its heading, what there is to see, and the ``<svg>`` element."""

    title: str
    caption: str
    svg: str


def draw_plots(results: Sequence[LevelResult], tolerances: Mapping[str, Any], identity: str) -> list[DrawnPlot]:
    """Every plot that the levels of one target have data for.

    Args:
        results: The target's level results.
        tolerances: The report's limits.
        identity: Unique within the page, letters, digits and hyphens.
    """
    data = {result.level: result.data for result in results}
    drawn = []
    with plot_style():
        for number, (level, draw) in enumerate(_PLOTS):
            plot = draw(data[level], tolerances) if data.get(level) else None
            if plot is not None:
                name = re.sub(r"[^a-z0-9]+", "-", f"{identity}-{number}")
                svg = svg_from_figure(plot.figure, identity=name, title=plot.title, description=plot.caption)
                drawn.append(DrawnPlot(title=plot.title, caption=plot.caption, svg=svg))
    return drawn
