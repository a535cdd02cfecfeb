"""Damage to TOML files that stays (nearly) TOML: values, keys, tables, nesting."""

from __future__ import annotations

import re
from random import Random

_ASSIGNMENT = re.compile(r"^([A-Za-z_]+)( *= *)(.*)$", re.MULTILINE)
_VALUES = (
    "0", "1", "-1", "2", "256", "1024", "2147483648", "9223372036854775807", "9223372036854775808", "1" + "0" * 5000,
    "1.0", "0.5", "1e400", "inf", "nan", "-nan", "true", "false", '""', '"x"', "''", '"cuda"', '"cpu"', '"fp16"', "[]",
    '"w8"', '"w8a8"', '"onnxruntime"', '"tensorrt"', '"tensorrt-rtx"', '"float16"', '"adaptive"', '"steps"', "{}",
    "[1]", "[1, 1]", "[1, 2, 3]", "[3, 2, 1]", "[1, 1, 9223372036854775807]", "[1, 1, 1, 1]", "[true, true, true]",
    "[1.0, 1.0, 1.0]", "[[1, 1, 1]]", '["a", "b"]', '["\\u0000"]', '"\\u001b[2J"', '"\\ud800"', '"../x"', "{a = 1}",
    "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "0x7f", "1_000", "[" * 200 + "]" * 200, "[" * 20_000, "=", "",
    '"' + "x" * 5000 + '"', '"""\n', "{a.b.c = 1, a.b.d = 2}", "{x = " * 2000,
)  # fmt: skip
_KEYS = ("name", "title", "runtime", "device", "threads", "options", "x", '""', '"a b"', "a.b", "options.x", "seq.max")
_LINES = (
    "[options]", "[[options]]", "[x]", "[seq]", "[options.x]", "x = 1", "options.spinning = true", "a.b.c = 1", "\x00",
    "a." * 3000 + "b = 1", "[" + "a." * 3000 + "b]", "# \x01", "\ufeff", "=1", "threads", "\r", "'\\n' = 1",
)  # fmt: skip


def edit_toml(content: bytes, random: Random) -> bytes:
    """Content with one change.

    Raises:
        ValueError: It is no UTF-8, or assigns nothing any more.
    """
    text = content.decode()
    found = list(_ASSIGNMENT.finditer(text))
    if not found:
        raise ValueError("no assignment")
    line = random.choice(found)
    key, equals, value = line.groups()
    other = random.choice(found)[3]
    replacement = random.choice(
        (
            *[f"{key}{equals}{random.choice(_VALUES)}"] * 6,
            f"{key}{equals}{other}",
            f"{key}{equals}[{value}]",
            f"{random.choice(_KEYS)}{equals}{value}",
            f"{key}x{equals}{value}",
            f"{line[0]}\n{line[0]}",
            f"{line[0]}\n{random.choice(_LINES)}",
            f"{random.choice(_LINES)}\n{line[0]}",
            f"{line[0]}\n{random.choice(_KEYS)}{equals}{random.choice(_VALUES)}",
            "",
        )
    )
    return (text[: line.start()] + replacement + text[line.end() :]).encode("utf-8", "surrogatepass")
