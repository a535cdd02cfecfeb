"""The ``--passes`` option: a number, or a word."""

from __future__ import annotations

from typing import Any

import click

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
