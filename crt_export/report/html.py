"""The report for readers: one HTML file with everything in it, from the document of ``report.json``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from crt_export.environment import require_extra
from crt_export.visible import visible

if TYPE_CHECKING:
    from crt_export.parity.report import ParityReport
    from crt_export.report.bench_page import BenchPage

_PURPOSE = "the HTML report"


def require_renderer() -> None:
    """Refuse to begin where the packages that render are missing.

    Raises:
        MissingDependencyError: jinja2, matplotlib or jsonschema is not installed or too old; names the extra.
    """
    require_extra(("jinja2", "matplotlib", "jsonschema"), _PURPOSE)


def render_html(
    report: ParityReport | Mapping[str, Any], bench: Mapping[str, Any] | None = None, *, bundle: str = ""
) -> str:
    """The report as one HTML page.

    Args:
        report: Of a validation, or the document of a benchmark, as
            :func:`crt_export.report.reading.read_document` gives them.
        bench: A benchmark that becomes a section of a validation's page.
        bundle: Name of the bundle that was validated, for the header; empty where it is not known.

    Returns:
        The page. It needs no network, no script and no other file, and is the same text for the same report and
        versions of jinja2 and matplotlib.

    Raises:
        MissingDependencyError: The extra ``report`` is not installed.
    """
    require_renderer()
    if isinstance(report, Mapping):
        return _rendered("bench.html.jinja", speed=_bench_page(report))
    from crt_export.report.page import page_from_report
    from crt_export.report.plots import draw_plots

    plots = {}
    for number, target in enumerate(report.targets, start=1):
        results = [result for result in report.levels if result.target == target]
        plots[target] = draw_plots(results, report.tolerances, f"plot-{number}")
    speed = None if bench is None else _bench_page(bench)
    return _rendered("report.html.jinja", page=page_from_report(report, plots, bundle=bundle), speed=speed)


def _bench_page(document: Mapping[str, Any]) -> BenchPage:
    from crt_export.report.bench_page import draw_bench_plots, page_from_bench

    return page_from_bench(document, draw_bench_plots(document, "bench"))


def _rendered(name: str, **values: Any) -> str:
    import jinja2
    import markupsafe

    templates = files("crt_export.report") / "templates"
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda file: (templates / file).read_text(encoding="utf-8")),
    )
    style = (templates / "report.css").read_text(encoding="utf-8")
    # The style sheet and the SVG are this package's own; matplotlib and svg.py escape every text in a plot.
    page = environment.get_template(name).render(style=markupsafe.Markup(style), own=markupsafe.Markup, **values)
    page = visible(page)
    # File names that are no UTF-8 reach Python as lone surrogates, which no file can hold.
    return page.encode("utf-8", errors="replace").decode("utf-8")
