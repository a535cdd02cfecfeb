"""How a report was made: the command and the time, so that it can be repeated."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime

import click


def command_line() -> str:
    """The command as it was given, quoted for a shell."""
    return shlex.join(["crt-export", *(click.get_current_context().find_root().obj or ())])


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
