"""JSON as every reader of the package takes it: one meaning, whatever parser or language reads it.

Duplicate keys, NaN and infinities, whole numbers beyond 64 bits, text that is no Unicode and deep nesting are refused:
parsers of different languages disagree about them.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

_MOST_LEVELS = 200


class FileTooLargeError(ValueError):
    """The file is larger than what it may be; nothing of it was read."""


def read_limited(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file, or of what a link to one leads to.

    Args:
        path: The file.
        most_bytes: Largest size that is read at all.

    Raises:
        OSError: It cannot be read, or is a folder, pipe or device.
        FileTooLargeError: It is larger than ``most_bytes``.
    """
    # Without O_NONBLOCK the opening of a pipe would wait for its writer.
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no regular file", str(path))
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise FileTooLargeError(f"it has {max(status.st_size, len(content))} bytes, at most {most_bytes} are read")
    return content


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
    """What :func:`parse_json` or :func:`read_limited` found wrong, as a clause."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start})"
    if isinstance(error, RecursionError):
        return f"is nested too deeply (more than {_MOST_LEVELS} levels)"
    if isinstance(error, FileTooLargeError):
        return f"is too large: {error}"
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
