"""Pages of measured results: ``python validate/results/pages.py`` writes their tables anew, and the one of the README.

A page is prose around blocks ``<!-- begin NAME -->`` to ``<!-- end -->``; a block's lines come from the JSON file of
the measurement and from nothing else, with the command, the day, the hardware and the versions that stand in it. What
was not measured is a dash. A test holds the pages to what this script writes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crt_export.cli.tables import REGIME_COLUMNS, regime_cells, speed_from_bench
from crt_export.parity.levels import CERTIFICATE
from crt_export.parity.report import COMPILED, ParityReport

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "validate" / "results"
PAGES = (*sorted((ROOT / "docs" / "results").glob("*.md")), ROOT / "README.md")
BENCH = "crt-export bench build/demo --target ort-cpu-fp32 --against ort-cpu-int8"
_BLOCK = re.compile(r"(<!-- begin ([a-z_]+) -->\n).*?(<!-- end -->)", re.S)

Document = Mapping[str, Any]
NONE = "–"


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A table in Markdown."""
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


def surroundings(document: Document) -> str:
    """When, on what and with what a result was measured."""
    day = str(document.get("date") or document["created"])[:10]
    machine = document.get("hardware") or document["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    return f"{day}, {machine['processor']}, {machine['cores']} cores, Python {machine['python']}, {versions}:"


def command(document: Document) -> Iterator[str]:
    """The command of a measurement and where it ran, in front of its table."""
    yield from ("```console", *(f"$ {line.strip()}" for line in document["command"].split(";")), "```", "")
    yield from (surroundings(document), "")


def ratios() -> Iterator[str]:
    """Performance targets: steps, loading, memory."""
    document = read("ratios")
    lines = [line for line in document["lines"] if line["limit"] is not None and "tokens" not in line["figure"]]
    sizes = list(dict.fromkeys(line["size"] for line in lines))
    rows: dict[str, dict[str, Document]] = {}
    for line in lines:
        rows.setdefault(line["figure"], {})[line["size"]] = line
    yield from command(document)
    yield from table(
        ["figure", "target", *sizes],
        [
            [figure, _limit(next(iter(by.values()))), *(_figure(by[size]) for size in sizes)]
            for figure, by in rows.items()
        ],
    )


def prompts() -> Iterator[str]:
    """Seconds from a prompt to its first token."""
    document = read("ratios")
    found: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for line in document["lines"]:
        split = re.fullmatch(r"(ort-cpu-\S+): (\d+) tokens, (exact, s|passes, K = \d+, s|break-even K)", line["figure"])
        if split:
            target, tokens, what = split.groups()
            found.setdefault((tokens, "tokens"), {})[line["size"], f"{target}: {what}"] = line["value"]
    columns = list(dict.fromkeys((size, what.split(":")[0]) for cells in found.values() for size, what in cells))
    yield from command(document)
    yield from table(
        ["prompt", *(f"{size} {target}: exact, passes, break-even K" for size, target in columns)],
        [
            [f"{tokens} {unit}", *(_prompt(cells, size, target) for size, target in columns)]
            for (tokens, unit), cells in found.items()
        ],
    )


def prompt_chunks() -> Iterator[str]:
    """Seconds of a prompt by the size of its chunks."""
    document = read("prompt_chunks")
    sizes = list(document["rows"][0]["seconds"])
    yield from command(document)
    yield from table(
        ["bundle", "target", "passes", *(f"chunks of {size}" for size in sizes)],
        [
            [
                f"`{row['bundle']}`",
                row["target"],
                str(row["passes"]),
                *(f"{row['seconds'][size]:.3g} s" for size in sizes),
            ]
            for row in document["rows"]
        ],
    )


def build_cost() -> Iterator[str]:
    """Time and memory of builds of the published sizes."""
    document = read("build_cost")
    rows = []
    for preset, runs in document["presets"].items():
        for name, run in ((preset, runs["build"]), (f"{preset}, one more target", runs.get("rebuild"))):
            if run:
                memory = run["peak_memory_mib"] / 1024
                rows.append([name, f"{run['seconds']:.0f} s", f"{run['cpu_seconds']:.0f} s", f"{memory:.1f} GiB"])
    yield from command(document)
    yield from table(["size", "time", "CPU time", "peak memory"], rows)


def real_scale() -> Iterator[str]:
    """Cost of every level at the published size."""
    document = read("real_scale")
    yield from command(document)
    yield from table(
        ["stage", "time", "CPU time", "peak memory"],
        [
            [s["stage"], f"{s['seconds']:.0f} s", f"{s['cpu_seconds']:.0f} s", f"{s['peak_memory_mib'] / 1024:.1f} GiB"]
            for s in document["stages"]
        ],
    )


def like_for_like() -> Iterator[str]:
    """CRT and plain transformer through the same backend."""
    document = read("like_for_like_cpu")
    yield from command(document)
    head = ["CRT / transformer", "backend", "tokens in cache", "ms a token", "CRT speed / transformer", "published"]
    head += ["advantage", "MB moved a token", "of it cache", "launches"]
    yield from table(head, [_pair(entry) for entry in document["entries"] if entry["status"] == "measured"])


def demo() -> Iterator[str]:
    """The targets of the demo: likelihood, speed where it was measured, and what ran."""
    report = ParityReport.from_dict(read("parity"))
    names = [name for name in report.targets if not name.startswith("pytorch-")]
    rows = {row.target: row for row in report.rows if row.regime == "step" and row.nll is not None}
    compiled = {row.target for row in report.rows if row.status == COMPILED}
    path = RESULTS / "demo_bench.json"
    speed = speed_from_bench(read("demo_bench"), path.relative_to(ROOT)) if path.is_file() else None
    times = {} if speed is None else speed.ms
    reference = rows[names[0]].reference_perplexity
    yield from table(
        [
            "target",
            f"perplexity (PyTorch FP32: {reference:.4f})",
            "difference of log-likelihood, nats",
            "ms a token",
            "here",
        ],
        [
            [
                f"`{name}`",
                f"{rows[name].perplexity:.4f}",
                _delta(rows[name]),
                f"{times[name]:.3g}" if name in times else NONE,
                "compiled" if name in compiled else "run",
            ]
            for name in names
        ],
    )
    yield from ("", f"{'ms a token: not measured yet' if speed is None else speed.sentence}.", "")
    yield from ("```console", f"$ {BENCH} --output {path.relative_to(ROOT)}", "```")


def _delta(row: Any) -> str:
    check = row.check("delta_nll")
    return f"{check.value:+.1e} {_ends(check.interval, '+.1e')}"


def parity() -> Iterator[str]:
    """Every regime of every target of the demo."""
    document = read("parity")
    report = ParityReport.from_dict(document)
    yield from command(document)
    yield from table([name.rstrip(">") for name in REGIME_COLUMNS], [list(regime_cells(row)) for row in report.rows])
    yield from ("", *(f"* {note}" for note in report.notes))


def certificate() -> Iterator[str]:
    """K passes against the recurrence, of the report that the gate for CI compares with."""
    path = ROOT / "examples" / "06_ci_gate" / "baseline.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    yield from command(document)
    rows, data = [], {}
    for result in (entry for entry in document["levels"] if entry["level"] == CERTIFICATE):
        data = result["data"]
        at, error = data["passes"].index(data["unroll"]), max(anchor["error"] for anchor in data["anchors"])
        rows += [
            [
                f"`{result['target']}`",
                f"{span['start']} to {span['stop']}",
                str(span["smallest_passes"] or NONE),
                f"{span['perplexity_gap'][at]:+.4f} {_ends(span['perplexity_gap_ci'][at], '+.4f')}",
                f"{span['excess'][at]:+.1e} {_ends(span['excess_ci'][at], '+.1e')}",
                f"{error:.1e}",
            ]
            for span in data["spans"]
        ]
    head = ["target", "positions", "smallest K within 0.01", f"perplexity of K = {data['unroll']} - recurrence"]
    yield from table([*head, "what the target adds, nats", "T passes over T tokens"], rows)


def _ends(interval: list[float], form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def _pair(entry: Document) -> list[str]:
    both = (entry["crt"], entry["transformer"])
    total, cache = ([f"{side['bytes'][part] / 1e6:.1f}" for side in both] for part in ("total", "cache"))
    launches = [NONE if side["launches"] is None else str(side["launches"]) for side in both]
    return [
        f"{entry['crt_model']} / {entry['transformer_model']}",
        entry["backend"],
        str(entry["position"]),
        " / ".join(f"{side['p50_ms']:.2f}" for side in both),
        f"**{entry['ratio']:.2f}** [{entry['low']:.2f}, {entry['high']:.2f}]",
        f"{entry['published_ratio']:g}",
        entry["advantage"],
        *(" / ".join(pair) for pair in (total, cache, launches)),
    ]


def _limit(line: Document) -> str:
    return f"{'at most' if line['at_most'] else 'at least'} {line['limit']:g}"


def _figure(line: Document) -> str:
    if line["value"] is None:
        return NONE
    return f"{line['value']:.3g}" + (" (**falls short**)" if line["verdict"] == "falls short" else "")


def _prompt(cells: Mapping[tuple[str, str], float], size: str, target: str) -> str:
    exact, passes, even = (
        next(
            value for (model, what), value in cells.items() if model == size and re.fullmatch(f"{target}: {part}", what)
        )
        for part in ("exact, s", "passes, .*", "break-even K")
    )
    return f"{exact:.3g} s, {passes:.3g} s, {even:.3g}"


def read(name: str) -> Document:
    """A result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


BLOCKS: Mapping[str, Callable[[], Iterator[str]]] = {
    block.__name__: block
    for block in (ratios, prompts, prompt_chunks, build_cost, real_scale, like_for_like, demo, parity, certificate)
}


def written_anew(page: str) -> str:
    """A page with every block as its result file has it.

    Raises:
        KeyError: A block that no function writes.
    """
    return _BLOCK.sub(lambda found: found[1] + "\n".join(BLOCKS[found[2]]()) + "\n" + found[3], page)


def main() -> int:
    """Write every page anew."""
    for page in PAGES:
        page.write_text(written_anew(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
