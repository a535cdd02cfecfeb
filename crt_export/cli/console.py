"""Output of the command line: text, JSON, tables, progress.

stdout carries results, stderr progress and messages; :mod:`~crt_export.cli.streams` sees to it that all of it arrives
and that no control character does. A terminal gets rich tables and one transient line; a file or pipe gets plain text.
rich is imported only when something is drawn with it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from crt_export.cli.streams import Drawn, sent
from crt_export.visible import visible_json, visible_line

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


def write_text(text: str, newline: bool = True) -> None:
    """Write to stdout at once; characters that it cannot encode are replaced."""
    sys.stdout.write(f"{text}\n" if newline else text)
    sys.stdout.flush()


def write_generated(text: str) -> None:
    """Write what a model said to stdout: as it is to a file or pipe, without control characters to a terminal."""
    if sys.stdout.isatty():
        write_text(text, newline=False)
    else:
        sent(sys.stdout, text)


def write_message(text: str, newline: bool = True) -> None:
    """Write to stderr at once."""
    if sys.stderr is not None:
        sys.stderr.write(f"{text}\n" if newline else text)
        sys.stderr.flush()


def write_json(document: Any) -> None:
    """Write one JSON document to stdout; its control characters are JSON's own escapes."""
    write_text(visible_json(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)))


@contextlib.contextmanager
def reserved_stdout(reserve: bool) -> Iterator[None]:
    """Send what libraries print to stderr while ``reserve``, to keep stdout for the JSON document."""
    with contextlib.redirect_stdout(sys.stderr) if reserve else contextlib.nullcontext():
        yield


def write_sentence(text: str) -> None:
    """Write a sentence to stdout: a terminal breaks it between words and shows verdicts in colour."""
    if not sys.stdout.isatty():
        write_text(text)
    else:
        _draw(visible_line(text))


def write_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Write a table to stdout; columns whose name ends in ``>`` are right-aligned.

    A terminal shows verdicts in colour. One that is too narrow for the table gets a paragraph per row, each cell with
    the name of its column, so that no word is ever folded.
    """
    names = [column.rstrip(">") for column in columns]
    right = [column.endswith(">") for column in columns]
    rows = [[visible_line(cell) for cell in row] for row in rows]
    lines = _table_lines(names, right, rows)
    if not sys.stdout.isatty():
        write_text("\n".join([*([title] if title else []), *lines]))
        return
    if max(map(len, lines)) > _width():
        pairs = (zip(names[1:], row[1:], strict=True) for row in rows)
        lines = [f"{row[0]}: {', '.join(f'{n} {c}' for n, c in p if c)}" for row, p in zip(rows, pairs, strict=True)]
    for line in [*([title] if title else []), *lines]:
        _draw(line)


#: Columns of a terminal as it comes.
_NARROW = 80


def _table_lines(names: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]]) -> list[str]:
    """Header and rows, columns padded with spaces, two between them; one where the table fits 80 columns only so."""
    widths = [max(len(row[i]) for row in (names, *rows)) for i in range(len(names))]
    gap = " " if sum(widths) + 2 * len(widths) - 2 > _NARROW >= sum(widths) + len(widths) - 1 else "  "

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, right, strict=True)
        )
        return gap.join(padded).rstrip()

    return [line(names), *map(line, rows)]


#: What a word means; nothing else has a colour.
_COLOURS = {"passed": "green", "validated": "green", "failed": "red", "FAILED": "red", "compiled": "yellow"}


def _draw(line: str) -> None:
    """A line of a terminal, broken between words; NO_COLOR and dumb terminals get no colour."""
    import textwrap

    from rich.console import Console
    from rich.text import Text

    console = Console(file=Drawn(sys.stdout), highlight=False, markup=False)  # type: ignore[arg-type]
    width = _width()
    fitting = (
        [line] if len(line) <= width else textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    )
    for part in fitting or [""]:
        text = Text(part)
        for word, colour in _COLOURS.items():
            text.highlight_regex(rf"(?<![\w-])(NOT )?{word}(?![\w-])", "red" if "NOT validated" in part else colour)
        console.print(text, soft_wrap=True)


def _width() -> int:
    """Columns of the terminal."""
    import shutil

    return shutil.get_terminal_size().columns


class ProgressLine:
    """A :class:`~crt_export.progress.Progress` on stderr.

    A terminal gets one transient line with a bar; a file or pipe one line per stage.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Start the bar where there is a terminal."""
        if sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            name = TextColumn("{task.description}", markup=False)
            columns = (SpinnerColumn(), name, BarColumn(), TimeElapsedColumn())
            console = Console(file=Drawn(sys.stderr))  # type: ignore[arg-type]
            # What is printed meanwhile goes its own way: rich would write it with all its control characters.
            self._bar = Progress(
                *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        stage = visible_line(stage)
        if self._bar is None:
            if stage != self._stage:
                write_message(stage)
        elif self._task is None or stage != self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(stage, total=total or None, completed=done)
        else:
            self._bar.update(self._task, completed=done, total=total or None)
        self._stage = stage
