"""Plots as SVG inside an HTML page: the page's own colours and fonts, and the same bytes for the same data.

Lines and bands are of data with gaps: what is null, or missing at the end of a list, is left out.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from crt_export.folders import temporary_folder
from crt_export.report.numbers import power_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = Sequence[float | None]
Intervals = Sequence[Sequence[float | None] | None]


#: In units of 1/72 inch: about as wide as a phone, so that text keeps its size there.
_WIDTH, _HEIGHT = 340, 232
#: Room for what stands around the axes, and for a line of the legend, in the same units.
_LEFT, _RIGHT, _TOP, _BOTTOM, _LEGEND_LINE = 44, 6, 20, 36, 15

# matplotlib knows no CSS variable: these colours stand in for them and are exchanged in the SVG.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215")
GOOD = "#010221"
_VARIABLES = {
    INK: "--plot-ink",
    MUTED: "--plot-muted",
    GRID: "--plot-grid",
    GOOD: "--plot-good",
    **{color: f"--plot-{index}" for index, color in enumerate(SERIES, start=1)},
}
#: Lines that differ in shape as well, so that nobody has to tell colours apart.
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.6, 1.2, 1.6)), (0, (9, 2)))
MARKERS = ("o", "s", "^", "D", "v")

_STYLE = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.borderaxespad": 0.0,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 9,
    "xtick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9,
    "ytick.major.size": 3,
    "ytick.minor.size": 0,
}


def _import_matplotlib() -> None:
    """Import matplotlib without its list of fonts, and its folders, being left in the user's home folder.

    A user who set MPLCONFIGDIR, and an application that imported matplotlib earlier, have decided for themselves.
    """
    if "matplotlib" in sys.modules or os.environ.get("MPLCONFIGDIR"):
        return
    with temporary_folder() as folder:
        os.environ["MPLCONFIGDIR"] = str(folder)
        try:
            importlib.import_module("matplotlib.font_manager")  # writes its list of fonts as it is imported
        finally:
            del os.environ["MPLCONFIGDIR"]


@contextmanager
def plot_style() -> Iterator[None]:
    """matplotlib's defaults with this package's style, whatever the user's settings are; they are put back after."""
    _import_matplotlib()
    import matplotlib
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]), matplotlib.rc_context():
        yield


@dataclass(frozen=True, kw_only=True, eq=False)
class Plot:
    """A figure, its title, and what there is to see in it."""

    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True, kw_only=True)
class DrawnPlot:
    """A plot for the page: its heading, what there is to see, and the ``<svg>`` element."""

    title: str
    caption: str
    svg: str


def drawn_plots(draw: Sequence[Callable[[], Plot | None]], identity: str) -> list[DrawnPlot]:
    """Call each function in the package's style and keep what had data.

    Args:
        draw: Gives a plot, or None where its data are missing.
        identity: Unique within the page, letters, digits and hyphens.
    """
    drawn = []
    with plot_style():
        for number, function in enumerate(draw):
            plot = function()
            if plot is not None:
                svg = svg_from_figure(
                    plot.figure, identity=f"{identity}-{number}", title=plot.title, description=plot.caption
                )
                drawn.append(DrawnPlot(title=plot.title, caption=plot.caption, svg=svg))
    return drawn


def new_plot(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure with one set of axes; the label of the vertical axis stands above it, where it is read first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
    axes = figure.add_subplot()
    set_margins(figure)
    axes.set_xlabel(xlabel)
    axes.set_title(ylabel, loc="left", color=MUTED, pad=5)
    axes.set_axisbelow(True)
    return figure, axes


def set_margins(figure: Figure, *, left: float = _LEFT, legend_lines: int = 0) -> None:
    """Place the axes: the same margins in every plot, so that plots side by side are aligned."""
    bottom = _BOTTOM + legend_lines * _LEGEND_LINE
    figure.set_size_inches(_WIDTH / 72, (_HEIGHT + legend_lines * _LEGEND_LINE) / 72)
    height = _HEIGHT + legend_lines * _LEGEND_LINE
    figure.subplots_adjust(left=left / _WIDTH, right=1 - _RIGHT / _WIDTH, top=1 - _TOP / height, bottom=bottom / height)


def add_legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Name the lines below the plot, where they cover no data."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        set_margins(figure, legend_lines=-(-len(handles) // columns))
        figure.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0.0, 0.0), ncols=columns, columnspacing=1.3,
            borderpad=0.1, labelspacing=0.35,
        )  # fmt: skip


# --- lines and bands
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


# --- axes
def log_axis(axes: Axes, which: str) -> None:
    """Logarithmic, ticks as powers of ten, and 2 and 5 of each where there are few. To be called after plotting."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    axis = getattr(axes, f"{which}axis")
    if high < 8 * low:  # less than a decade: round numbers as on a linear axis
        ticks = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high)
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0,) if high > 60 * low else (1.0, 2.0, 5.0), numticks=7))
    axis.set_major_formatter(FuncFormatter(_decade))
    axis.set_minor_locator(NullLocator())


def symlog_axis(axes: Axes, which: str, linear: float) -> None:
    """Logarithmic on both sides of zero, linear within ``linear`` of it."""
    from matplotlib.ticker import FuncFormatter, NullLocator, SymmetricalLogLocator

    getattr(axes, f"set_{which}scale")("symlog", linthresh=linear)
    axis = getattr(axes, f"{which}axis")
    locator = SymmetricalLogLocator(base=10, linthresh=linear)
    locator.set_params(numticks=7)
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(_decade))
    axis.set_minor_locator(NullLocator())


def _decade(value: float, _tick: int | None = None) -> str:
    """1, 10, 0.1 and 0.01 as they are, other powers of ten as powers."""
    if value == 0:
        return "0"
    mantissa, _e, exponent = f"{abs(value):.1e}".partition("e")
    mantissa = mantissa.removesuffix(".0")
    sign = "−" if value < 0 else ""
    if -3 <= int(exponent) <= 3:
        return f"{sign}{abs(value):.3g}"
    return f"{sign}{'' if mantissa == '1' else f'{mantissa}×'}{power_text(int(exponent))}"


def svg_from_figure(figure: Figure, *, identity: str, title: str, description: str) -> str:
    """The figure as an ``<svg>`` element.

    Args:
        figure: What :func:`new_plot` made.
        identity: Unique within the page, letters, digits and hyphens: every id in the SVG begins with it.
        title: What assistive technology names the plot.
        description: What is to be seen, in a sentence.

    Returns:
        The element without fixed size, colours as CSS variables, text as text in the page's font.
    """
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": identity}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=metadata)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = _own_ids(text, identity)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r"(?:font-family: )?'DejaVu Sans'(?:, sans-serif)?", lambda found: _font(found[0]), text)
    box = re.search(r'viewBox="[^"]*"', text)
    label = f'role="img" aria-labelledby="{identity}-title {identity}-desc"'
    head = f"<svg {box[0] if box else ''} {label}>"
    words = (
        f'<title id="{identity}-title">{escape(title)}</title><desc id="{identity}-desc">{escape(description)}</desc>'
    )
    return head + words + re.sub(r"\n\s*", "\n", text[text.index(">") + 1 :]).strip()


def _font(found: str) -> str:
    return "font-family: var(--sans)" if found.startswith("font-family") else "var(--sans)"


def _own_ids(text: str, identity: str) -> str:
    """Drop ids that nothing points at, and put the plot's name before the others: they share a page."""
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))

    def renamed(found: re.Match[str]) -> str:
        return f' id="{identity}-{found[1]}"' if found[1] in used else ""

    text = re.sub(r' id="([^"]*)"', renamed, text)
    text = re.sub(r"url\(#", f"url(#{identity}-", text)
    return re.sub(r'(?:xlink:)?href="#', f'href="#{identity}-', text)
