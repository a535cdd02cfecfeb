"""Damage to a JSON document that stays (nearly) JSON: values, types, keys, nesting, numbers that parsers dispute."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Site = tuple[Any, Any]  # a container, and the key or index of one of its values

#: Stands for a token that Python's writer would not write; see :func:`json_text`.
_RAW = "\ue000raw:{}\ue001"
_NUMBERS = (0, -1, 1, 2, 3, 7, 255, 256, 4096, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, -(2**63))
_FRACTIONS = (0.0, -0.0, 0.5, 1.0, 1e-300, 5e-324, 1e16, 1e300, 1.7976931348623157e308, -1e-9)
_RAW_TOKENS = (
    "NaN", "-Infinity", "1e400", "-1e999", "9223372036854775808", "-9223372036854775809", "1" + "0" * 5000, "01", "1.",
    ".5", "+1", "0x10", "1E2", "1e2", "-0", "1.0", "tru", "nulL", "'x'", '"\\ud800"', '"\\udc00\\ud800"', '"\\x41"',
    '"\x01"', '"\t"', '"\\u0000"', "", ",", "[", "{", "]", "}", '"', "[1,]", '{"a":1,}', "/* */ 1", "{}{}",
)  # fmt: skip
_TEXTS = (
    "", " ", ".", "..", "/", "../x", "/etc/passwd", "a/../b", "a//b", "a\\b", "C:x", "con", "x" * 300, "x" * 5000, "é",
    "e\u0301", "\u202e", "\x00", "\n", "\x1b[31m", "\x7f", "%s%n", "{0}", "manifest.json", "float32", "float16", "fp32",
    "w8", "w8a8", "cuda", "cpu", "tensorrt-rtx", "none", "byte", "tokenizer.json", "1", "-1", "1e9", "true", "null",
)  # fmt: skip
_DEPTHS = (1, 2, 20, 150, 199, 200, 201, 500, 900, 980, 1000, 50_000)


def edit_json(content: bytes, random: Random) -> bytes:
    """Content with one change.

    Raises:
        ValueError: It is no JSON any more.
    """
    document = json.loads(content)
    return json_text(change(document, random)).encode("utf-8", "surrogatepass")


def change(document: Any, random: Random, edits: tuple[Callable[..., object], ...] = ()) -> Any:
    """The document with one change, in place where that can be.

    Args:
        document: Parsed JSON.
        random: Decides.
        edits: Changes to choose from, each called with the document, a site and random; all of them by default.
    """
    sites = list(_sites(document))
    if not sites:
        return random.choice(_values())
    random.choice(edits or _EDITS)(document, random.choice(sites), random)
    return document


def json_text(document: Any) -> str:
    """The text of a changed document; raw tokens stand where their marks were."""
    text = json.dumps(document, ensure_ascii=False)
    first, last = json.dumps(_RAW, ensure_ascii=False).split("{}")
    parts = text.split(first)
    return parts[0] + "".join(_unmarked(part, last) for part in parts[1:])


def is_plain(document: Any) -> bool:
    """Whether the document holds no raw token, so that its text has these very values."""
    return "\ue000" not in json.dumps(document, ensure_ascii=False)


def _unmarked(part: str, last: str) -> str:
    token, _, rest = part.partition(last)
    return json.loads(f'"{token}"') + rest


def _sites(document: Any) -> Iterator[Site]:
    pending = [document]
    while pending:
        container = pending.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items if isinstance(container, dict | list) else ():
            yield container, key
            if isinstance(value, dict | list):
                pending.append(value)


def _values() -> tuple[Any, ...]:
    return (None, True, False, [], {}, [[]], {"": None}, *_NUMBERS[:6], *_FRACTIONS[:4], *_TEXTS[:6])


def _boundary(document: Any, site: Site, random: Random) -> None:
    """Another value of the same type."""
    container, key = site
    value = container[key]
    if isinstance(value, bool):
        container[key] = not value
    elif isinstance(value, int):
        container[key] = random.choice((*_NUMBERS, value + 1, value - 1, -value, value * 2, value << 32))
    elif isinstance(value, float):
        container[key] = random.choice((*_FRACTIONS, -value, value * 2))
    elif isinstance(value, str):
        container[key] = random.choice((*_TEXTS, value + "x", value[:-1], value.upper(), value + "\0", value * 2))
    elif isinstance(value, list):
        container[key] = random.choice(([], value * 2, value[1:], value[::-1], [value], value * 100))
    else:
        container[key] = random.choice(_values())


def _other_type(document: Any, site: Site, random: Random) -> None:
    container, key = site
    value = container[key]
    container[key] = random.choice((*_values(), [value], {"value": value}, str(value)[:100]))


def _raw(document: Any, site: Site, random: Random) -> None:
    site[0][site[1]] = _RAW.format(random.choice(_RAW_TOKENS))


def _remove(document: Any, site: Site, random: Random) -> None:
    del site[0][site[1]]


def _rename(document: Any, site: Site, random: Random) -> None:
    container, key = site
    if isinstance(container, dict):
        value = container.pop(key)
        container[random.choice((*_TEXTS, key + "x", key[:-1], key.upper(), key + "\0", "\x1b[2J" + key))] = value


def _twice(document: Any, site: Site, random: Random) -> None:
    """The same key a second time, right behind the first."""
    container, key = site
    if isinstance(container, dict):
        value, other = container[key], random.choice((container[key], *_values()))
        container[key] = _RAW.format(f"{json.dumps(value)},{json.dumps(key)}:{json.dumps(other)}")


def _cross(document: Any, site: Site, random: Random) -> None:
    """The value of another place."""
    other, key = random.choice(list(_sites(document)))
    site[0][site[1]] = copy.deepcopy(other[key])


def _swap(document: Any, site: Site, random: Random) -> None:
    container, key = site
    other = random.choice(list(container) if isinstance(container, dict) else range(len(container)))
    container[key], container[other] = container[other], container[key]


def _deepen(document: Any, site: Site, random: Random) -> None:
    depth = random.choice(_DEPTHS)
    begin, end = random.choice((("[", "]"), ('{"x":', "}")))
    site[0][site[1]] = _RAW.format(begin * depth + "0" + end * random.choice((depth, depth, 0, depth - 1)))


def _add(document: Any, site: Site, random: Random) -> None:
    container = site[0]
    if isinstance(container, dict):
        container[random.choice(_TEXTS)] = random.choice(_values())
    else:
        container.insert(random.randrange(len(container) + 1), random.choice((*_values(), container[0])))


_EDITS = (
    _boundary, _boundary, _boundary, _other_type, _other_type, _raw, _remove, _rename, _twice, _cross, _swap, _deepen,
    _add,
)  # fmt: skip
