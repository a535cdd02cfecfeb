"""A benchmark report as tables."""

from __future__ import annotations

from crt_export.bench.report import BenchReport, Candidate, PrefillFigures, Quantiles
from crt_export.cli.console import write_table, write_text

_STEP_COLUMNS = (
    "step", "position>", "p50 ms>", "p90>", "p99>", "max>", "tokens/s>", "MB moved>", "floor ms>", "p50/floor>",
    "compute ms>", "overhead>",
)  # fmt: skip
_PREFILL_COLUMNS = ("prompt", "tokens>", "method", "K>", "first token s>", "p90>")
_MEMORY_COLUMNS = (
    "load and memory", "import s>", "open s>", "first token s>", "weights MiB>", "pss step>", "anonymous>",
    "with prefill>", "anonymous>", "peak rss>", "2nd session>", "device>",
)  # fmt: skip


def write_bench_tables(report: BenchReport) -> None:
    """Write everything that a report says."""
    hardware = report.hardware
    write_text(
        f"{report.bundle['name']}: {report.model.parameters:,} parameters, {hardware['processor']}, "
        f"{report.options['threads']} threads, batch {report.options['batch']}"
    )
    if report.bandwidth is not None and report.compute is not None:
        write_text(_rates("read bandwidth", report.bandwidth.read_gb_s, "GB/s"))
        write_text(_rates("float32 products", report.compute.gflop_s, "GFLOP/s"))
    ran = [candidate for candidate in report.candidates if not candidate.reason]
    write_text("")
    write_table(_STEP_COLUMNS, _step_rows(ran))
    write_text("")
    write_table(_PREFILL_COLUMNS, [_prefill_row(c, row) for c in ran for row in c.prefill])
    write_text("")
    write_table(_MEMORY_COLUMNS, [_memory_row(candidate) for candidate in ran])
    if report.ratios:
        write_text("")
        write_table(("faster than", "what", "ratio>", "95 %>", "rounds>"), _ratio_rows(report))
    for candidate in report.candidates:
        if candidate.reason:
            write_text(f"not run: {candidate.name}: {candidate.reason}")
    for note in report.notes:
        write_text(f"note: {note}")


def _rates(name: str, rates: Quantiles, unit: str) -> str:
    return f"{name}: p10 {rates.p10:.1f}, p50 {rates.p50:.1f}, p90 {rates.p90:.1f} {unit}"


def _step_rows(candidates: list[Candidate]) -> list[tuple[str, ...]]:
    rows = []
    for candidate in candidates:
        for step in candidate.step:
            times = (step.p50_ms, step.p90_ms, step.p99_ms, step.max_ms)
            rows.append(
                (
                    candidate.name,
                    str(step.position),
                    *(f"{value:.3f}" for value in times),
                    f"{step.tokens_per_s:.1f}",
                    "-" if step.bytes is None else f"{step.bytes.total / 1e6:.1f}",
                    _number(step.floor_ms, 3),
                    _number(step.over_floor, 2),
                    _number(step.compute_floor_ms, 3),
                    "-" if step.runtime_overhead is None else f"{step.runtime_overhead:.1%}",
                )
            )
    return rows


def _prefill_row(candidate: Candidate, row: PrefillFigures) -> tuple[str, ...]:
    passes = "-" if row.passes is None else str(row.passes)
    return (candidate.name, str(row.tokens), row.method, passes, f"{row.p50_s:.4f}", f"{row.p90_s:.4f}")


def _memory_row(candidate: Candidate) -> tuple[str, ...]:
    load, memory = candidate.load, candidate.memory
    times = (None, None, None) if load is None else (load.import_s, load.open_s, load.first_token_s)
    sizes = (None,) * 8
    if memory is not None:
        sizes = (
            memory.weight_file,
            memory.pss_step,
            memory.anonymous_step,
            memory.pss,
            memory.anonymous,
            memory.peak_rss,
            memory.second_session,
            memory.device,
        )
    mebibytes = ("-" if size is None else f"{size / 2**20:.1f}" for size in sizes)
    return (candidate.name, *(_number(seconds, 2) for seconds in times), *mebibytes)


def _ratio_rows(report: BenchReport) -> list[tuple[str, ...]]:
    return [
        (
            f"{ratio.of} than {ratio.against}",
            f"step at {ratio.at}" if ratio.what == "step" else f"prompt of {ratio.at}",
            f"{ratio.ratio:.2f} x",
            f"{ratio.low:.2f} to {ratio.high:.2f}",
            str(ratio.rounds),
        )
        for ratio in report.ratios
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
