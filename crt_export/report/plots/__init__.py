"""The plots of a report: one function per curve of a level, each with what it shows in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from crt_export.parity.levels import CERTIFICATE, CHAIN, CORPUS, FREE_RUNNING, LONG_RUN
from crt_export.parity.report import LevelResult
from crt_export.report.plots.certificate import (
    plot_drift_by_passes,
    plot_gap,
    plot_handover,
    plot_perplexity,
    plot_residual,
)
from crt_export.report.plots.decoding import (
    plot_agreement,
    plot_chain,
    plot_divergence_by_position,
    plot_error_growth,
    plot_headroom,
    plot_histogram,
    plot_likelihood_by_position,
    plot_state_norm,
)
from crt_export.report.svg import DrawnPlot, Plot, drawn_plots

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


def draw_plots(results: Sequence[LevelResult], tolerances: Mapping[str, Any], identity: str) -> list[DrawnPlot]:
    """Every plot that the levels of one target have data for.

    Args:
        results: The target's level results.
        tolerances: The report's limits.
        identity: Unique within the page, letters, digits and hyphens.
    """
    data = {result.level: result.data for result in results}
    return drawn_plots([partial(draw, data[level], tolerances) for level, draw in _PLOTS if data.get(level)], identity)
