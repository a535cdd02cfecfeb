"""A benchmark in words and tables of formatted figures, for its HTML section and the terminal; no markup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crt_export.report.numbers import MISSING, interval_text, number_text, share_text

_MIB = 2**20
_MEGABYTE = 10**6


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
    plots: tuple[Any, ...]
    facts: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    notes: tuple[str, ...]
    command: str
    created: str


def page_from_bench(document: Mapping[str, Any], plots: Sequence[Any] = ()) -> BenchPage:
    """Put a benchmark into words.

    Args:
        document: The benchmark, as :func:`crt_export.report.reading.read_document` gives it.
        plots: What :func:`crt_export.report.plots.bench.draw_bench_plots` gave.
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
        created=document["created"].replace("T", " ").replace("+00:00", " UTC"),
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
    kind = model["model_type"].replace("_", " ")
    return (
        f"{model['name']}: a {kind} of {model['parameters']:,} parameters, {model['num_hidden_layers']} layers of "
        f"{model['hidden_size']:,}, on {document['hardware'].get('processor', 'this machine')}"
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
        ("Machine", _named(document["hardware"])),
        ("Rates, p10 / p50 / p90", tuple(rates)),
        ("Versions", (("crt-export", document["crt_export"]), *_named(document["versions"]))),
        ("Bundle", _named(document["bundle"])),
        ("Options", _named(document["options"])),
    )


def _named(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(str(key) for key in value)
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value))
        return f"{value:,}" if type(value) is int else str(value)

    named = ((key.replace("_", " "), shown(value)) for key, value in values.items() if value is not None)
    return tuple((key, text) for key, text in named if text)
