"""``crt-export report``: a report for readers."""

from __future__ import annotations

from pathlib import Path

import click

from crt_export.cli.options import PATH, junit_option


@click.command()
@click.argument("report", type=PATH, metavar="REPORT.json|BUNDLE")
@click.option("--output", "--html", "output", type=PATH, required=True, metavar="FILE.html", help="The page to write.")
@junit_option
def report(report: Path, output: Path, junit: Path | None) -> None:
    """Turn a report, or the one that a bundle holds, into one HTML page that opens anywhere, offline.

    Exit code 0 whether the report passed or not: the page says which.
    """
    from crt_export.report.html import render_html, require_renderer
    from crt_export.report.junit import junit_cases, write_junit
    from crt_export.report.output import check_outputs, write_output
    from crt_export.report.reading import read_report

    require_renderer()
    check_outputs([output, junit], inputs=[report])
    document = read_report(report)
    write_output(output, render_html(document))
    if junit is not None:
        write_junit(junit, junit_cases(document))
    click.echo(f"wrote {output}", err=True)
