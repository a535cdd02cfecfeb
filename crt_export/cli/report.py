"""``crt-export report``: a report for readers."""

from __future__ import annotations

from pathlib import Path

import click

from crt_export.cli.console import write_message
from crt_export.cli.options import PATH, junit_option
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
    from crt_export.report.html import render_html, require_renderer
    from crt_export.report.junit import junit_cases, write_junit
    from crt_export.report.output import check_outputs, write_output
    from crt_export.report.reading import read_bench, read_document

    require_renderer()
    check_outputs([output, junit], inputs=[report, bench])
    document = read_document(report)
    measured = isinstance(document, dict)
    if measured and (bench is not None or junit is not None):
        raise InputError(f"{report} is a benchmark: --bench and --junit go with the report of a validation")
    speed = None if bench is None else read_bench(bench)
    name = report.resolve().name if report.is_dir() else ""
    write_output(output, render_html(document, speed, bundle=name))
    if junit is not None and not isinstance(document, dict):
        write_junit(junit, junit_cases(document))
    write_message(f"wrote {output}")
