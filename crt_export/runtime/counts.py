"""Counts that applications pass."""

from __future__ import annotations

from crt_export.errors import InputError


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
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{name} must be a whole number, found {value!r}")
    number = value.__index__()
    if number < least or (most is not None and number > most):
        upper = f" and at most {most}{limit}" if most is not None else ""
        raise InputError(f"{name} must be at least {least}{upper}, found {number}")
    return number
