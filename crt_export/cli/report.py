"""``crt-export report`` and ``compare``: reports that exist, as a page for readers and held against an older one."""

from __future__ import annotations

from pathlib import Path

import click

from crt_export.cli.console import write_json, write_message, write_sentence, write_table
from crt_export.cli.options import PATH, json_option, junit_option
from crt_export.errors import InputError


@click.command()
@click.argument("report", type=PATH, metavar="REPORT.json|BENCH.json|BUNDLE")
@click.option("--output", "--html", "output", type=PATH, required=True, metavar="FILE.html", help="The page to write.")
@click.option("--bench", type=PATH, metavar="BENCH.json", help="A benchmark that becomes a section of the page.")
@junit_option
def report(report: Path, output: Path, bench: Path | None, junit: Path | None) -> None:
    """Turn a report, or the one that a bundle holds, into one HTML page that opens anywhere, offline.

    A benchmark (crt-export bench --output) becomes a page of its own.

    Exit code 0 whether the report passed or not: the page says which.
    """
    from crt_export.report.output import ReportFiles
    from crt_export.report.reading import read_bench, read_document

    files = ReportFiles(html=output, junit=junit)
    files.check(inputs=[report, bench])
    document = read_document(report)
    if isinstance(document, dict) and (bench is not None or junit is not None):
        raise InputError(f"{report} is a benchmark: --bench and --junit go with the report of a validation")
    speed = None if bench is None else read_bench(bench)
    name = report.resolve().name if report.is_dir() else ""
    files.write(document, speed, bundle=name)
    write_message(f"wrote {output}")


@click.command()
@click.argument("old", type=PATH)
@click.argument("new", type=PATH)
@junit_option
@json_option
def compare(old: Path, new: Path, junit: Path | None, as_json: bool) -> None:
    """Compare report NEW with report OLD (report.json or bundle); exit code 1 if something regressed beyond noise.

    A regression is a gate that held and fails, a target, level or check that is gone, or a gated figure that is worse
    by more than the 95 % intervals of both in quadrature (without an interval: by a quarter), and by more than a tenth
    of its limit. Reports of another model, text or amount of measurement are refused with exit code 2.
    """
    from crt_export.report.compare import SAME, compare_reports
    from crt_export.report.junit import write_junit
    from crt_export.report.output import check_outputs
    from crt_export.report.reading import read_report

    check_outputs([junit], inputs=[old, new])
    result = compare_reports(read_report(old), read_report(new), names=(str(old), str(new)))
    if junit is not None:
        write_junit(junit, result.junit_cases())
    if as_json:
        write_json(result.to_dict())
    else:
        rows = [
            (change.place, _figure(change.old), _figure(change.new), _figure(change.noise), change.verdict)
            for change in result.changes
            if change.verdict != SAME
        ]
        if rows:
            write_table(("what", "old>", "new>", "noise>", "verdict"), rows, title="what changed beyond noise")
        for change in result.regressions:
            if change.reason:
                write_sentence(f"regression: {change.place}: {change.reason}")
        for note in result.notes:
            write_sentence(f"note: {note}")
        count = len(result.regressions)
        words = f"FAILED, {count} regression{'s' * (count != 1)}" if count else "no regression"
        write_sentence(f"compare: {words} in {len(result.changes):,} gates and figures")
    if not result.passed:
        raise click.exceptions.Exit(1)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
