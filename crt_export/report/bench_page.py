"""A benchmark in words, tables of formatted figures and plots, for its HTML section and the terminal; no markup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from crt_export.report.numbers import (
    MISSING,
    count_text,
    interval_text,
    named_values,
    number_text,
    share_text,
    time_text,
)
from crt_export.report.svg import (
    GOOD,
    INK,
    SERIES,
    DrawnPlot,
    Plot,
    add_legend,
    add_line,
    add_threshold,
    drawn_plots,
    log_axis,
    new_plot,
    set_margins,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIB = 2**20
_MEGABYTE = 10**6
_NAMES_WIDTH = 132  # room for names left of the axes, in the units of svg.py
_LONGEST_NAME = 22


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the section; the first column names the row, the others hold figures.

    Attributes:
        anchor: Unique within the page.
        heading: Above it.
        caption: What its figures mean.
        columns: Names of the columns.
        rows: As many cells each.
    """

    anchor: str
    heading: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class BenchPage:
    """Everything that the templates and the terminal show of a benchmark."""

    headline: str
    summary: str
    subtitle: str
    tables: tuple[Table, ...]
    absent: tuple[tuple[str, str], ...]
    plots: tuple[DrawnPlot, ...]
    facts: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    notes: tuple[str, ...]
    command: str
    created: str


def page_from_bench(document: Mapping[str, Any], plots: Sequence[DrawnPlot] = ()) -> BenchPage:
    """Put a benchmark into words.

    Args:
        document: The benchmark, as :func:`crt_export.report.reading.read_document` gives it.
        plots: What :func:`draw_bench_plots` gave.
    """
    candidates = document["candidates"]
    tables = (_steps(candidates), _ratios(document), _prompts(candidates), _memory(candidates))
    return BenchPage(
        headline=_headline(candidates[0]),
        summary=_summary(document),
        subtitle=_subtitle(document),
        tables=tuple(table for table in tables if table.rows),
        absent=tuple((who["name"], who["reason"]) for who in candidates if who["status"] != "measured"),
        plots=tuple(plots),
        facts=_facts(document),
        notes=tuple(document["notes"]),
        command=document["command"],
        created=time_text(document["created"]),
    )


def _headline(target: Mapping[str, Any]) -> str:
    if not target["step"]:
        return "Not run"
    return f"{number_text(target['step'][0]['p50_ms'])} ms a token"


def _summary(document: Mapping[str, Any]) -> str:
    """The target's first step in a sentence."""
    target = document["candidates"][0]
    if not target["step"]:
        return f"{target['name']} did not run: {target['reason']}"
    step = target["step"][0]
    words = f"{target['name']} decodes {number_text(step['tokens_per_s'])} tokens a second"
    words += f" with {step['position']:,} tokens in the cache"
    if step["over_floor"] is not None:
        words += f", {number_text(step['over_floor'])} times the floor that the memory's read rate sets"
    return f"{words}."


def _subtitle(document: Mapping[str, Any]) -> str:
    model = document["model"]
    kind, count = model["model_type"].replace("_", " "), model["parameters"]
    size = "" if count is None else f" of {count:,} parameters"
    return (
        f"{model['name']}: a {kind}{size}, {model['hidden_size']:,} wide, {count_text(model['caches'], 'cache')}, "
        f"on {document['hardware'].get('processor', 'this machine')}"
    )


# --- tables
def _steps(candidates: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        "Candidate", "tokens in cache", "batch", "p50, ms", "p90, ms", "p99, ms", "max, ms", "tokens/s", "MB moved",
        "floor, ms", "compute floor, ms", "over floor", "outside the engine",
    )  # fmt: skip
    return Table(
        anchor="steps",
        heading="Steps",
        caption="One token. Floor: bytes that have to be moved, at the 90th percentile of the sampled read rate.",
        columns=columns,
        rows=tuple((who["name"], *_step_cells(step)) for who in candidates for step in who["step"]),
    )


def _step_cells(step: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{step['position']:,}", f"{step['batch']:,}")
    for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms", "tokens_per_s"):
        yield number_text(step[name])
    yield MISSING if step["bytes"] is None else number_text(step["bytes"]["total"] / _MEGABYTE)
    yield from (number_text(step["floor_ms"]), number_text(step["compute_floor_ms"]), number_text(step["over_floor"]))
    yield share_text(step["runtime_overhead"], 1)


def _ratios(document: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            ratio["against"],
            ratio_place(ratio),
            number_text(ratio["ratio"]),
            interval_text((ratio["low"], ratio["high"]), 3),
            f"{ratio['rounds']:,}",
        )
        for ratio in document["ratios"]
    )
    return Table(
        anchor="ratios",
        heading="Against others",
        caption=f"How many times longer each took than {document['candidates'][0]['name']}, round by round.",
        columns=("Candidate", "what", "ratio", "95 % interval", "rounds"),
        rows=rows,
    )


def _prompts(candidates: Sequence[Mapping[str, Any]]) -> Table:
    rows = tuple(
        (
            who["name"],
            f"{prompt['tokens']:,}",
            prefill_method(prompt),
            number_text(prompt["p50_s"] * 1e3),
            number_text(prompt["p90_s"] * 1e3),
            number_text(prompt["tokens"] / prompt["p50_s"]) if prompt["p50_s"] else MISSING,
        )
        for who in candidates
        for prompt in who["prefill"]
    )
    return Table(
        anchor="prompts",
        heading="Time to first token",
        caption="From an empty cache to the logits after the prompt.",
        columns=("Candidate", "tokens", "how", "p50, ms", "p90, ms", "tokens/s"),
        rows=rows,
    )


def _memory(candidates: Sequence[Mapping[str, Any]]) -> Table:
    kinds = ("weight_file", "pss_step", "anonymous_step", "pss", "anonymous", "second_session", "peak_rss", "device")
    rows = []
    for who in candidates:
        load, memory = who["load"] or {}, who["memory"] or {}
        if load or memory:
            seconds = (number_text(load.get(name)) for name in ("import_s", "open_s", "first_token_s"))
            sizes = (memory.get(kind) for kind in kinds)
            mib = (MISSING if size is None else number_text(size / _MIB, 4) for size in sizes)
            rows.append((who["name"], *seconds, *mib))
    columns = (
        "Candidate", "import, s", "open, s", "first token, s", "weight file", "PSS, steps", "anonymous, steps", "PSS",
        "anonymous", "second session", "peak RSS", "device",
    )  # fmt: skip
    return Table(
        anchor="memory",
        heading="Load and memory",
        caption="Sizes in MiB, each candidate in a process of its own, libraries included.",
        columns=columns,
        rows=tuple(rows),
    )


def ratio_place(ratio: Mapping[str, Any]) -> str:
    """At which position or for which prompt a ratio was measured."""
    if ratio["what"] == "step":
        return f"step at {ratio['position']:,}"
    return f"prompt of {ratio['tokens']:,}"


def prefill_method(prompt: Mapping[str, Any]) -> str:
    """How a prompt was fed: ``default``, ``passes, K = 5``, ``exact``."""
    passes = "" if prompt["passes"] is None else f", K = {prompt['passes']}"
    return f"{prompt['method']}{passes}"


# --- what it stands on
def _facts(document: Mapping[str, Any]) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    rates = []
    for name, unit, found in (
        ("memory read", "GB/s", (document["bandwidth"] or {}).get("read_gb_s")),
        ("float32 products", "GFLOP/s", (document["compute"] or {}).get("gflop_s")),
    ):
        if found:
            ends = (number_text(found[end]) for end in ("p10", "p50", "p90"))
            rates.append((f"{name}, {unit}", " / ".join(ends)))
    return (
        ("Machine", named_values(document["hardware"])),
        ("Rates, p10 / p50 / p90", tuple(rates)),
        ("Versions", (("crt-export", document["crt_export"]), *named_values(document["versions"]))),
        ("Bundle", named_values(document["bundle"])),
        ("Options", named_values(document["options"])),
    )


# --- plots
def draw_bench_plots(document: Mapping[str, Any], identity: str) -> list[DrawnPlot]:
    """Every plot that a benchmark has data for.

    Args:
        document: The benchmark.
        identity: Unique within the page, letters, digits and hyphens.
    """
    plots = (plot_steps, plot_ratios, plot_prompts, plot_bandwidth)
    return drawn_plots([partial(draw, document) for draw in plots], identity)


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
