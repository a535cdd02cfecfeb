"""The files a report is written to: checked before any work, complete or not written at all."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crt_export.errors import InputError, problem_list

if TYPE_CHECKING:  # an old report can be read where torch is not installed
    from crt_export.parity.report import ParityReport


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Where a report goes; None writes none of that kind.

    Attributes:
        report: JSON, the whole report.
        html: For readers, one file with plots.
        junit: JUnit XML, a test case per check.
    """

    report: Path | None = None
    html: Path | None = None
    junit: Path | None = None

    def check(self) -> None:
        """Refuse what could not be written after minutes of work.

        Raises:
            InputError: A folder does not exist, or a path is one; all of them listed.
            MissingDependencyError: HTML is wanted and the ``report`` extra is not installed.
        """
        check_outputs([path for path in (self.report, self.html, self.junit) if path is not None])
        if self.html is not None:
            from crt_export.report.html import require_renderer

            require_renderer()

    def write(self, report: ParityReport) -> None:
        """Write every file that was asked for."""
        if self.report is not None:
            write_output(self.report, json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
        if self.html is not None:
            from crt_export.report.html import render_html

            write_output(self.html, render_html(report.to_dict()))
        if self.junit is not None:
            from crt_export.report.junit import junit_cases, junit_xml

            write_output(self.junit, junit_xml(junit_cases(report.to_dict())))


def check_outputs(paths: list[Path]) -> None:
    """Refuse paths that nothing can be written to.

    Raises:
        InputError: A folder does not exist, or a path is one; all of them listed.
    """
    problems = [f"{path} is a folder, expected a file" for path in paths if path.is_dir()]
    problems += [
        f"{path}: the folder {path.parent} does not exist, make it first" for path in paths if not path.parent.is_dir()
    ]
    if problems:
        raise InputError(problem_list("output files", problems))


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it: what was there stays until the new content is complete.

    Raises:
        InputError: The path cannot be written to.
    """
    check_outputs([path])
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            os.fchmod(stream.fileno(), 0o666 & ~_umask())
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask; mkstemp ignores it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
