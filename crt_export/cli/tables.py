"""Bundles and parity reports in a terminal: verdict first and last, one row per target, the rest with ``--full``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crt_export.bundle import BundleFiles
from crt_export.cli.console import write_sentence, write_table, write_text
from crt_export.parity.levels import OWN_MODEL, WHEN_BUILT
from crt_export.parity.metrics import WITHIN, Check
from crt_export.parity.report import COMPILED, GAP, RUN, Comparison, LevelResult, ParityReport, held
from crt_export.report.numbers import count_text
from crt_export.report.reading import report_of_bundle
from crt_export.report.verdict import gates_held, own_model_text, target_checks, verdict_of

TARGET_COLUMNS = ("target", "perplexity>", "delta nll>", "top-1>", "gates>", "result", "size>", "ms>")
GRAPH_COLUMNS = ("graph", "roles", "weights")
REGIME_COLUMNS = (
    "target", "graph", "regime", "tokens>", "perplexity>", "reference>", "delta nll (95 %)>", "max error>",
    "mean KL>", "top-1>", "result",
)  # fmt: skip
LEVEL_COLUMNS = ("target", "level", "gates>", "closest to its limit", "value>", "limit>", "result")
_SHOWN_FAILURES = 20
_GAP_NOTE = (
    "regime-gap compares K passes with the steps of the same target (reference column); excess is how much wider that "
    "gap is than in PyTorch FP32, and is what its gate judges"
)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a benchmark measured of a bundle's targets.

    Attributes:
        file: The benchmark.
        created: When, ISO 8601, UTC.
        hardware: The machine.
        position: Tokens in the cache before the steps.
        batch: Rows of a step.
        ms: Median of a step by target, milliseconds.
    """

    file: str
    created: str
    hardware: Mapping[str, Any]
    position: int
    batch: int
    ms: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """Where and how the column was measured."""
        machine = f"{self.hardware.get('processor', 'an unknown machine')}, {self.hardware.get('cores', '?')} cores"
        return (
            f"ms a token: median step, {self.position} tokens in the cache, batch {self.batch}, on {machine}, "
            f"{self.created[:10]} ({self.file})"
        )


def speed_from_bench(document: Mapping[str, Any], path: Path) -> Speed | None:
    """The first position of every target of the bundle that was measured; None where none was.

    Args:
        document: The benchmark, as :func:`crt_export.report.reading.bench_of_bundle` gives it.
        path: Its file.
    """
    steps = {who["name"]: who["step"][0] for who in document["candidates"] if who["kind"] == "target" and who["step"]}
    if not steps:
        return None
    first = next(iter(steps.values()))
    return Speed(
        file=str(path),
        created=document["created"],
        hardware=document["hardware"],
        position=first["position"],
        batch=first["batch"],
        ms={name: step["p50_ms"] for name, step in steps.items()},
    )


def bundle_document(bundle: BundleFiles) -> dict[str, Any]:
    """What ``build --json`` and ``inspect --json`` print: where the bundle is, its identity, and its manifest.

    Raises:
        InputError: The parity report that it holds is none.
        BundleError: The manifest contradicts itself.
    """
    return {
        **bundle.manifest,
        "kind": "bundle",
        "path": str(bundle.path),
        "identity": bundle.identity,
        "bytes": bundle_bytes(bundle),
        "own_model": own_model_text(report_of_bundle(bundle)),
        "memory": memory_of_rows(bundle),
    }


def memory_of_rows(bundle: BundleFiles) -> dict[str, dict[str, int]]:
    """By target: the capacity of a row, bytes of its states and of its caches.

    Raises:
        BundleError: The manifest contradicts itself.
    """
    from crt_export.runtime.opening import model_from_manifest

    model, found = model_from_manifest(bundle), {}
    for name, target in bundle.manifest["targets"].items():  # whatever its profile says: nothing is opened
        capacity = min(target["capacity"], model.max_position_embeddings)
        sizes = model.carried.row_bytes(capacity)
        caches = sizes[f"cache_bytes_{target['cache_dtype']}"]
        found[name] = {"capacity": capacity, "state_bytes": sizes["state_bytes"], "cache_bytes": caches}
    return found


def bundle_bytes(bundle: BundleFiles) -> int:
    """Size of all files that the manifest lists, in bytes."""
    return sum(entry["size"] for entry in bundle.manifest["files"].values())


def write_bundle(bundle: BundleFiles, path: Path, *, speed: Speed | None = None, full: bool = False) -> None:
    """Write what a bundle holds and how well it agrees with PyTorch.

    Args:
        bundle: The bundle.
        path: How the user calls it.
        speed: What was measured of it.
        full: Every regime, every level, profiles, graphs with who opens them, and notes too.

    Raises:
        InputError: The parity report that it holds is none.
        BundleError: The manifest contradicts itself.
    """
    manifest, report = bundle.manifest, report_of_bundle(bundle)
    verdict = (
        f"{path}: {'validated' if manifest['validated'] else 'NOT validated'}, {own_model_text(report)}, "
        f"{readable_size(bundle_bytes(bundle))} in {len(bundle.names)} files, "
        f"made by {manifest['tool']['name']} {manifest['tool']['version']}"
    )
    write_sentence(verdict)
    write_sentence(f"identity {bundle.identity} (SHA-256 of manifest.json)")
    if report is not None:
        write_summary(report, {name: _target_bytes(manifest, name) for name in manifest["targets"]}, speed)
    if full or report is None:
        rows = [
            (
                name,
                str(target["profile"].get("precision", "?")),
                str(target["capacity"]),
                "-" if target["unroll"] is None else str(target["unroll"]),
                ", ".join(target["engines"] or target["graphs"]),
                str(target["profile"].get("title", "")),
            )
            for name, target in manifest["targets"].items()
        ]
        write_table(("target", "precision", "capacity>", "unroll>", "parts", "title"), rows)
        graphs = [(g["file"], ", ".join(g["roles"]), g["weights"] or "-") for g in manifest["graphs"]]
        write_table(GRAPH_COLUMNS, graphs, title="graphs and who opens them")
    for names, sizes in _alike(memory_of_rows(bundle)):
        state, caches = readable_size(sizes["state_bytes"]), readable_size(sizes["cache_bytes"])
        words = f"{state} of state, and {caches} of caches of {sizes['capacity']:,} tokens"
        write_sentence(f"a row of {', '.join(names)} holds {words}")
    if full and report is not None:
        write_report_tables(report)
    write_next(
        f"crt-export inspect {path} --full",
        f"crt-export generate {path} --prompt TEXT",
        f"crt-export report {path} --output report.html",
    )
    if report is not None:
        write_verdict(report)
    else:
        write_sentence(f"parity: {'' if manifest['validated'] else 'NOT '}validated, {own_model_text(report)}")


def _alike(memory: Mapping[str, dict[str, int]]) -> Iterator[tuple[list[str], dict[str, int]]]:
    """Targets whose rows hold the same, together."""
    shown: list[dict[str, int]] = []
    for sizes in memory.values():
        if sizes not in shown:
            shown.append(sizes)
            yield [name for name, other in memory.items() if other == sizes], sizes


def _target_bytes(manifest: Mapping[str, Any], name: str) -> int:
    """Size of everything that a target is made of: engines, graphs, and the weights that those share with others."""
    target = manifest["targets"][name]
    weights = {graph["file"]: graph["weights"] for graph in manifest["graphs"]}
    graphs = set(target["graphs"].values())
    parts = {*graphs, *target["engines"].values(), *(weights[file] for file in graphs if weights.get(file))}
    return sum(manifest["files"][file]["size"] for file in parts)


def write_verdict(report: ParityReport) -> None:
    """Write how a report came out: the last line of every command that makes or shows one."""
    verdict = verdict_of(report)
    words = f"parity: {'passed' if report.passed else 'FAILED'}, {own_model_text(report)}"
    write_sentence(f"{words}. {verdict.summary}")


def write_next(*commands: str) -> None:
    """Write what one would do next."""
    for label, command in zip(("next:", *("",) * (len(commands) - 1)), commands, strict=True):
        write_text(f"{label:<5} {command}")


def write_summary(
    report: ParityReport,
    sizes: Mapping[str, int] | None = None,
    speed: Speed | None = None,
    *,
    failures: bool = True,
) -> None:
    """Write one row per target, and what failed, unless the caller says that itself.

    Args:
        report: The report.
        sizes: Bytes of a target by name, where they are known.
        speed: What was measured of the targets, if anything was.
        failures: Whether to write what failed.
    """
    known = {"size>": sizes is not None, "ms>": speed is not None}
    kept = [index for index, name in enumerate(TARGET_COLUMNS) if known.get(name, True)]
    ms = {} if speed is None else speed.ms
    rows = [
        _target_cells(report, name, (sizes or {}).get(name, 0), ms.get(name))
        for name in report.targets
        if not name.startswith("pytorch-")
    ]
    if rows:
        columns, *shown = ([cells[index] for index in kept] for cells in (TARGET_COLUMNS, *rows))
        write_table(columns, shown, title="step by step against PyTorch FP32")
        if speed is not None:
            write_sentence(speed.sentence)
    elif report.levels:  # nothing was built: the reference is not the user's own model
        write_table(LEVEL_COLUMNS, [_level_cells(result) for result in report.levels])
    if failures:
        _write_failures(report.levels)
    caveat = verdict_of(report).caveat
    if caveat:
        write_sentence(f"note: {caveat}")
    for note in (note for result in report.levels if result.level == OWN_MODEL for note in result.notes):
        if note.startswith(WHEN_BUILT):
            write_sentence(f"note: {note}")
    if report.notes:
        write_text(f"{count_text(len(report.notes), 'note')} on what was shortened or left out: --full, report.json")


def write_report_tables(report: ParityReport) -> None:
    """Write every regime and every level, and below them what the report says about them."""
    rows = report.rows
    if rows:
        write_table(REGIME_COLUMNS, [regime_cells(row) for row in rows], title="agreement with PyTorch FP32")
    notes = list(report.notes)
    if any(row.check("gap_delta_nll") for row in rows):
        notes.append(_GAP_NOTE)
    for note in notes:
        write_sentence(f"note: {note}")
    if report.levels:
        write_table(LEVEL_COLUMNS, [_level_cells(result) for result in report.levels], title="the ladder")


def _write_failures(results: Sequence[LevelResult]) -> None:
    failures = [f"{result.target} {result.level}: {failure}" for result in results for failure in result.failures]
    for failure in failures[:_SHOWN_FAILURES]:
        write_sentence(f"failed: {failure}")
    if len(failures) > _SHOWN_FAILURES:
        write_sentence(f"failed: {len(failures) - _SHOWN_FAILURES} more, all of them in the report (--json, --report)")


# --- one row per target
def _target_cells(report: ParityReport, target: str, size: int, ms: float | None) -> tuple[str, ...]:
    rows = [row for row in report.rows if row.target == target]
    step = next((row for row in rows if row.regime == "step" and row.status == RUN and row.nll is not None), None)
    checks = target_checks(report, target)
    good, gates = gates_held(checks)
    compiled = any(row.status == COMPILED for row in rows)
    passed = held(checks)
    figures = ("-", "-", "-")
    if step is not None:
        figures = (
            _perplexity(step.perplexity),
            _half_width(step.check("delta_nll")),
            _figure(step.value("top1_agreement"), ".2%"),
        )
    result = "FAILED" if passed is False else COMPILED if compiled else "passed" if passed else RUN
    return (target, *figures, f"{good}/{gates}", result, readable_size(size), _figure(ms, ".3g"))


def _half_width(check: Check | None) -> str:
    """A difference and half the width of its interval, exponents without leading zeros: ``+1.2e-6 ±3.4e-6``."""
    if check is None or check.value is None:
        return "-"
    half = "" if check.interval is None else f" ±{(check.interval[1] - check.interval[0]) / 2:.1e}"
    return f"{check.value:+.1e}{half}".replace("e-0", "e-").replace("e+00", "").replace("e+0", "e+")


# --- every regime
def regime_cells(row: Comparison) -> tuple[str, ...]:
    """A regime's cells, one for each of ``REGIME_COLUMNS``."""
    return (
        row.target,
        row.graph,
        row.regime + (f" {row.positions[0]}-{row.positions[1]}" if row.positions else ""),
        _figure(row.tokens, ",d"),
        _perplexity(row.perplexity),
        # A regime gap is compared with the target's own steps, not with PyTorch FP32.
        "step " * (row.regime == GAP) + _perplexity(row.reference_perplexity),
        _difference(row),
        _figure(row.value("max_abs_logit_error"), ".2g"),
        _figure(row.value("mean_kl"), ".2g"),
        _figure(row.value("top1_agreement"), ".3%"),
        ", ".join(_result(row)),
    )


def _difference(row: Comparison) -> str:
    """What the likelihood gate judges: of a target's regime gap the excess over that of PyTorch FP32."""
    excess = row.check("gap_delta_nll")
    check = excess or row.check("delta_nll")
    if check is None or check.value is None:
        return "-"
    ends = "" if check.interval is None else f" [{check.interval[0]:+.1e}, {check.interval[1]:+.1e}]"
    return f"{'excess ' if excess else ''}{check.value:+.1e}{ends}"


def _result(row: Comparison) -> Iterator[str]:
    yield row.status if row.passed is None else "passed" if row.passed else "FAILED"
    if row.better_than_chance is False:
        yield "nll not gated"
    if "emulated" in (row.arithmetic or ""):
        yield str(row.arithmetic)


def _perplexity(value: float | None) -> str:
    """Four decimals, as far as they say something: an untrained model's may have thirty digits."""
    return _figure(value, ".4f" if value is None or value < 1e6 else ".3e")


def _figure(value: float | None, form: str) -> str:
    """A figure of a report; whole numbers may stand there as 4096.0, which JSON calls an integer too."""
    return "-" if value is None else format(int(value) if form.endswith("d") else value, form)


# --- every level
def _level_cells(result: LevelResult) -> tuple[str, ...]:
    good, gates = gates_held(result.checks)
    measured = [
        check
        for check in result.checks
        if check.passed is not None and check.limit and (check.value is not None or check.interval)
    ]
    closest = max(measured, key=lambda check: check.limit_usage, default=None)
    named = ("-", "-", "-") if closest is None else (closest.name, _value(closest), f"{closest.limit:g}")
    ungated = "not compared" if result.level == OWN_MODEL else "run"
    outcome = ungated if result.passed is None else "passed" if result.passed else "FAILED"
    return (result.target, result.level, f"{good}/{gates}", *named, outcome)


def _value(check: Check) -> str:
    if check.relation == WITHIN and check.interval:
        low, high = check.interval
        return f"[{low:+.1e}, {high:+.1e}]"
    return f"{check.value:.3g}"


def readable_size(size: float) -> str:
    """A byte count for people: 1,536 gives ``1.5 KiB``, 838,451 gives ``819 KiB``."""
    units = ("bytes", "KiB", "MiB", "GiB")
    unit = next((place for place in range(3) if size < 1024 ** (place + 1)), 3)
    value = size / 1024**unit
    return f"{value:.{1 if unit and value < 100 else 0}f} {units[unit]}"
