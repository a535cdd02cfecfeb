"""The files a report is written to: checked before any work, complete or not written at all.

The one for readers is a single HTML file with everything in it, made of the document of ``report.json``.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crt_export.environment import require_extra
from crt_export.errors import InputError, OutputError, problem_list
from crt_export.user_files import kind_of, write_file
from crt_export.visible import visible

if TYPE_CHECKING:  # an old report can be read where torch is not installed
    from crt_export.parity.report import ParityReport
    from crt_export.report.bench_page import BenchPage

#: What is wrong with the place and would be with any other name there.
_NOT_THE_NAME = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Where a report goes; None writes none of that kind.

    Attributes:
        report: JSON, the whole report or benchmark.
        html: For readers, one file with plots.
        junit: JUnit XML, a test case per check.
    """

    report: Path | None = None
    html: Path | None = None
    junit: Path | None = None

    def check(self, *, inputs: Sequence[Path | None] = ()) -> None:
        """Refuse what could not be written after minutes of work, or would overwrite what it is made of.

        Args:
            inputs: Files and folders that the command reads; None is none.

        Raises:
            InputError: See :func:`check_outputs`.
            MissingDependencyError: HTML is wanted and the ``report`` extra is not installed.
        """
        check_outputs([self.report, self.html, self.junit], inputs=inputs)
        if self.html is not None:
            require_renderer()

    def write(
        self, report: ParityReport | Mapping[str, Any], bench: Mapping[str, Any] | None = None, *, bundle: str = ""
    ) -> None:
        """Write every file that was asked for; arguments as of :func:`render_html`, a benchmark has no JUnit XML."""
        if self.report is not None:
            document = report if isinstance(report, Mapping) else report.to_dict()
            write_output(self.report, json.dumps(document, indent=1, allow_nan=False) + "\n")
        if self.html is not None:
            write_output(self.html, render_html(report, bench, bundle=bundle))
        if self.junit is not None and not isinstance(report, Mapping):
            from crt_export.report.junit import junit_cases, write_junit

            write_junit(self.junit, junit_cases(report))


def check_outputs(
    files: Sequence[Path | None], *, inputs: Sequence[Path | None] = (), folder: Path | None = None
) -> None:
    """Refuse paths that nothing can be written to, or that would overwrite an input or each other.

    Args:
        files: Files to write; None is none.
        inputs: Files and folders that the command reads; nothing is written into such a folder either.
        folder: A folder to fill; it is made where there is none.

    Raises:
        InputError: A path is of the wrong kind, its folder does not exist, or it is an input, lies in one, or is named
            twice; all of them listed.
    """
    wanted = [path for path in files if path is not None]
    problems = [problem for path in wanted if (problem := _kind_problem(path))]
    if folder is not None and folder.exists() and not folder.is_dir():
        found = "a file" if folder.is_file() else kind_of(folder.stat().st_mode)
        problems.append(f"{folder} is {found}, expected a folder")
    every = [*wanted, *([folder] if folder is not None else [])]
    problems += [
        f"{path}: the folder {path.parent} does not exist, make it first" for path in every if not path.parent.is_dir()
    ]
    problems += [_overwriting(path, source) for path in every for source in inputs if source and _holds(source, path)]
    places = [_place(path) for path in every]
    problems += [f"{path} is named twice" for path, place in zip(every, places, strict=True) if places.count(place) > 1]
    if problems:
        raise InputError(problem_list("output files", list(dict.fromkeys(problems))))


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file in one step, see :mod:`crt_export.user_files`; to a pipe or a terminal it is written as it is.

    Raises:
        InputError: The path cannot be written to.
        OutputError: What it leads to is full or broken.
        BrokenPipeError: It is a pipe that nobody reads any more.
    """
    check_outputs([path])
    try:
        write_file(path, content.encode() if isinstance(content, str) else content, streams=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        kind = OutputError if error.errno in _NOT_THE_NAME else InputError
        raise kind(f"{path} cannot be written: {error.strerror or error}") from error


def _kind_problem(path: Path) -> str | None:
    """Why nothing can be written to what is there: neither a file, nor something that takes bytes one after another."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # nothing there; whatever else is wrong shows on writing
        return None
    if stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return None
    return f"{path} is {kind_of(mode)}, expected a file"


def _holds(source: Path, path: Path) -> bool:
    """Whether a path is an input, or lies inside an input folder."""
    return _place(path).is_relative_to(_place(source))


def _place(path: Path) -> Path:
    """The path without links; as far as it can be told where they go round in circles, which Path.resolve refuses."""
    return Path(os.path.realpath(path))


def _overwriting(path: Path, source: Path) -> str:
    what = "lies in" if source.is_dir() else "is"
    return f"{path} {what} {source}, which is read: write it somewhere else"


# --- the page for readers
def require_renderer() -> None:
    """Refuse to begin where the packages that render are missing.

    Raises:
        MissingDependencyError: jinja2, matplotlib or jsonschema is not installed or too old; names the extra.
    """
    require_extra(("jinja2", "matplotlib", "jsonschema"), "the HTML report")


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

    templates = resources.files("crt_export.report") / "templates"
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
