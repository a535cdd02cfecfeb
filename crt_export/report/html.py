"""The report for readers: one HTML file with everything in it, from the document of ``report.json``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from crt_export.environment import require_extra
from crt_export.report.gates import targets_of
from crt_export.report.page import page_from_report

if TYPE_CHECKING:
    from crt_export.parity.report import ParityReport

_PURPOSE = "the HTML report"


def require_renderer() -> None:
    """Refuse to begin where the packages that render are missing.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed or too old; names the extra.
    """
    require_extra(("jinja2", "matplotlib"), _PURPOSE)


def render_html(report: Mapping[str, Any] | ParityReport) -> str:
    """The report as one HTML page.

    Args:
        report: The document, as :func:`crt_export.report.reading.read_report` gives it, or the report itself.

    Returns:
        The page. It needs no network, no script and no other file, and is the same text for the same report and
        versions of jinja2 and matplotlib.

    Raises:
        MissingDependencyError: The extra ``report`` is not installed.
    """
    require_renderer()
    import jinja2
    import markupsafe

    from crt_export.report.plots import draw_plots

    document: Mapping[str, Any] = report if isinstance(report, Mapping) else report.to_dict()
    plots = {}
    for number, target in enumerate(targets_of(document), start=1):
        results = [result for result in document["levels"] if result["target"] == target]
        plots[target] = draw_plots(results, document["tolerances"], f"plot-{number}")
    templates = files("crt_export.report") / "templates"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((templates / "report.html.jinja").read_text(encoding="utf-8"))
    style = (templates / "report.css").read_text(encoding="utf-8")
    # The style sheet and the SVG are this package's own; matplotlib and svg.py escape every text in a plot.
    page = template.render(
        page=page_from_report(document, plots), style=markupsafe.Markup(style), own=markupsafe.Markup
    )
    # File names that are no UTF-8 reach Python as lone surrogates, which no file can hold.
    return page.encode("utf-8", errors="replace").decode("utf-8")
