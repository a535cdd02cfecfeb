"""Options that several verbs share, and how a report was made: the command and the time."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


class _PathType(click.Path):
    """A path that the system takes for one; the package itself checks what lies there and names the remedy."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what nothing can be called: asking for it fails, in whatever way."""
        try:
            os.lstat(value)
        except ValueError as error:
            self.fail(f"{value[:_SHOWN]!r} is no name of a file: {error}", param, ctx)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self.fail(f"{value[:_SHOWN]!r}... is no name of a file: {error.strerror}", param, ctx)
        return super().convert(value, param, ctx)


#: Characters of such a name in a message.
_SHOWN = 60
PATH = _PathType(path_type=Path)


def json_option(command: Command) -> Command:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")(command)


def full_option(command: Command) -> Command:
    """``--full``."""
    help_text = "Show every regime and every level, not one row per target."
    return click.option("--full", is_flag=True, help=help_text)(command)


def junit_option(command: Command) -> Command:
    """``--junit``."""
    help_text = "Write the verdicts as JUnit XML, for CI systems."
    return click.option("--junit", type=PATH, metavar="FILE.xml", help=help_text)(command)


def text_options(command: Command) -> Command:
    """``--text`` and ``--tokens``, which exclude each other."""
    tokens = click.option("--tokens", type=PATH, metavar="FILE.npy", help="Token ids in place of text (integers, 1-D).")
    help_text = "Real text (UTF-8, at most 256 MiB) of the model's domain."
    text = click.option("--text", type=PATH, metavar="FILE", help=help_text)
    return text(tokens(command))


def validation_tokens_option(command: Command) -> Command:
    """``--validation-tokens``; the package checks the number."""
    return click.option(
        "--validation-tokens",
        type=int,
        default=4096,
        show_default=True,
        metavar="N",
        help="Held-out tokens, at least 4096: scored by step and prefill; "
        "handover scores the second half of each window.",
    )(command)


def expect_option(command: Command) -> Command:
    """``--expect``."""
    return click.option(
        "--expect",
        type=PATH,
        metavar="FILE.safetensors",
        help="What your own PyTorch model gives: input_ids [n], logits float32 [n, vocab]. Compared first, before any "
        "graph; a difference is explained where config.json can be its cause.",
    )(command)


def require_one_text(text: Path | None, tokens: Path | None) -> None:
    """Refuse ``--text`` together with ``--tokens``."""
    if text is not None and tokens is not None:
        raise click.UsageError("--text and --tokens exclude each other: give one of them")


_WORDS = ("adaptive", "exact")


class PassesType(click.ParamType):
    """A whole number as int, ``adaptive`` or ``exact`` as they are; the runtime judges how large a number may be."""

    name = "K|adaptive|exact"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Read the text of the command line."""
        if value in _WORDS:
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"expected a number of passes, {' or '.join(_WORDS)}, found {value!r}", param, ctx)


def command_line() -> str:
    """The command as it was given, quoted for a shell."""
    return shlex.join(["crt-export", *(click.get_current_context().find_root().obj or ())])


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
