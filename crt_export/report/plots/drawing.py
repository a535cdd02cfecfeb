"""Lines and bands of data with gaps: what is null, or missing at the end of a list, is left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crt_export.report.svg import DASHES, MARKERS, MUTED, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = Sequence[float | None]
Intervals = Sequence[Sequence[float | None] | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plot:
    """A figure, its title, and what there is to see in it."""

    title: str
    caption: str
    figure: Figure


def add_line(axes: Axes, xs: Sequence[float], ys: Numbers, label: str, index: int, **style: Any) -> bool:
    """A line of the series ``index``: colour, dash and marker of its own; False where there is no data."""
    points = [(x, y) for x, y in zip(xs, ys, strict=False) if y is not None]
    if not points:
        return False
    marker = MARKERS[index % len(MARKERS)] if len(points) <= 24 else ""
    look = {"color": SERIES[index % len(SERIES)], "linestyle": DASHES[index % len(DASHES)], "marker": marker}
    axes.plot(*zip(*points, strict=True), label=label, **{**look, **style})
    return True


def add_band(axes: Axes, xs: Sequence[float], intervals: Intervals, index: int, *, floor: float | None = None) -> None:
    """The intervals around a line, in its colour; ``floor`` is the least that a logarithmic axis can show."""
    points = []
    for x, interval in zip(xs, intervals, strict=False):
        low, high = interval if interval is not None and len(interval) == 2 else (None, None)
        if low is not None and high is not None and (floor is None or high > floor):
            points.append((x, low if floor is None else max(low, floor), high))
    if points:
        positions, lows, highs = zip(*points, strict=True)
        axes.fill_between(positions, lows, highs, color=SERIES[index % len(SERIES)], alpha=0.16, linewidth=0)


def add_threshold(axes: Axes, value: float, text: str, *, vertical: bool = False) -> None:
    """A thin line with its meaning beside it."""
    if vertical:
        axes.axvline(value, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        place = {"xy": (value, 1), "xycoords": ("data", "axes fraction"), "xytext": (3, -1), "va": "top"}
    else:
        axes.axhline(value, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        place = {
            "xy": (1, value),
            "xycoords": ("axes fraction", "data"),
            "xytext": (-1, 2),
            "va": "bottom",
            "ha": "right",
        }
    axes.annotate(text, textcoords="offset points", color=MUTED, fontsize=8.5, **place)


def positive(values: Numbers) -> list[float | None]:
    """What a logarithmic axis can show: the rest is left out."""
    return [value if value is not None and value > 0 else None for value in values]


def known(values: Iterable[float | None]) -> list[float]:
    """The values that are not null."""
    return [value for value in values if value is not None]


def span_name(span: Any) -> str:
    """The positions of a span: ``positions 0–128``."""
    return f"positions {span.get('start', 0)}–{span.get('stop', 0)}"
