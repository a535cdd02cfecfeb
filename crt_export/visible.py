"""Control characters as visible escapes: what a bundle, a checkpoint or a model says must not steer a terminal."""

from __future__ import annotations

import re

# C0 but tab and newline, DEL, C1; line and paragraph separators; marks and overrides of the reading direction, which
# make a text look like another one.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""The text with every control character but newline and tab as Python would escape it: ``\x1b``."""
    return text if text.isascii() and text.isprintable() else _CONTROL.sub(_escape, text)


def visible_line(text: str) -> str:
    """Likewise for what must stay on one line, such as a cell of a table: newline and tab are escaped too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def visible_json(text: str) -> str:
    """A JSON document with the same characters as JSON's own escapes; its values stay the same."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
