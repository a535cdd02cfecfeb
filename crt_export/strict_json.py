"""JSON as every reader of the package takes it: one meaning, whatever parser or language reads it.

Duplicate keys, NaN and infinities, whole numbers beyond 64 bits, text that is no Unicode and deep nesting are refused:
parsers of different languages disagree about them.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

_MOST_LEVELS = 200


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: It is not JSON or not what all readers agree about, see :func:`json_problem`.
        UnicodeDecodeError: It is not UTF-8.
        RecursionError: Lists and objects are nested too deeply.
    """
    value = parse_unique_keys(content)
    _check_values(value)
    return value


def parse_unique_keys(content: bytes) -> Any:
    """As :func:`parse_json`, without a look at every value: for large files that another parser reads for good."""
    return json.loads(content.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def json_problem(error: ValueError | RecursionError) -> str:
    """What :func:`parse_json` found wrong, as a clause."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start})"
    if isinstance(error, RecursionError):
        return f"is nested too deeply (more than {_MOST_LEVELS} levels)"
    return f"is not JSON ({error})"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                raise ValueError(f"the key {name!r:.100} stands twice in one object")
            names.add(name)
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_values(root: object) -> None:
    """Refuse what parsers of different languages disagree about.

    Raises:
        RecursionError: Lists and objects are nested too deeply.
        ValueError: A whole number needs more than 64 bits, another number is infinite, or a text is no Unicode.
    """
    pending = [(root, 0)]
    while pending:
        value, level = pending.pop()
        if isinstance(value, dict | list):
            if level == _MOST_LEVELS:
                raise RecursionError
            items = [*value, *value.values()] if isinstance(value, dict) else value
            pending.extend((item, level + 1) for item in items)
        elif isinstance(value, str):
            if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"{value!r:.60} is not valid Unicode")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number is beyond the range of floats")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("a whole number is beyond 64 bits")
