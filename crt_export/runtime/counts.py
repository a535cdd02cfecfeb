"""Numbers that applications pass, made plain: a number of numpy's keeps its width, and wraps or overflows later."""

from __future__ import annotations

import math
import operator
from numbers import Integral, Real

from crt_export.errors import InputError

_SHOWN = 80


def whole_number(name: str, value: int, *, least: int = 1, most: int | None = None, limit: str = "") -> int:
    """Check a count.

    Args:
        name: What to call it in the message.
        value: The number.
        least: Smallest allowed.
        most: Largest allowed; None for any.
        limit: Where ``most`` comes from.

    Raises:
        InputError: It is not a whole number, or out of range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # arrays have __index__ too
        number = None
    if number is None:
        raise InputError(f"{name} must be a whole number, found {shown(value)}")
    if number < least or (most is not None and number > most):
        upper = f" and at most {most}{limit}" if most is not None else ""
        raise InputError(f"{name} must be at least {least}{upper}, found {shown(number)}")
    return number


def plain_int(value: object) -> int | None:
    """The whole number as Python's own; None if it is none."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def plain_float(value: object) -> float | None:
    """The number as a finite float64; None if it is none, or too large to be one."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def shown(value: object) -> str:
    """A value for a message: cut where it is long, and any number, which repr() refuses beyond 4,300 digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of more than 4300 digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
