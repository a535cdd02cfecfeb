"""Numbers, times and named values as readers of a report want them; what is missing is a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number_text(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits: ``0.0123``, ``4,096``, ``1.2×10⁻⁵``; its minus is no hyphen."""
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e6):
        return f"{int(value):,}".replace("-", "−")
    if 1e-3 <= abs(value) < 1e5:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{places}f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa.replace('-', '−')}×{power_text(int(exponent))}"


def power_text(exponent: int) -> str:
    """A power of ten: ``10⁻⁵``."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def interval_text(interval: Sequence[float | None] | None, digits: int = 2) -> str:
    """``[−1.2×10⁻⁵, 4.5×10⁻⁴]``; empty where there is none."""
    if interval is None:
        return ""
    return "[" + ", ".join(number_text(end, digits) for end in interval) + "]"


def share_text(value: float | None, digits: int = 3) -> str:
    """A share as a percentage: ``99.470 %``."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:.{digits}f} %".replace("-", "−")


def count_text(count: int, noun: str) -> str:
    """``1 gate``, ``2 gates``, ``1,024 gates``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def time_text(created: str) -> str:
    """A time of a report, ISO 8601 in UTC: ``2026-11-22 21:40:00 UTC``."""
    return created.replace("T", " ").replace("+00:00", " UTC")


def named_values(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Names and values in words; what is None or empty is left out."""

    def shown(value: Any) -> str:
        if isinstance(value, Mapping | list | tuple):
            return ", ".join(map(str, value))
        return f"{value:,}" if type(value) is int else str(value)

    named = ((key.replace("_", " "), shown(value)) for key, value in values.items() if value is not None)
    return tuple((key, text) for key, text in named if text)
