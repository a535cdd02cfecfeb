"""What applications pass, made plain: numbers of numpy's keep their width, and overflow later; lists may be none."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from numbers import Integral, Real

import numpy as np

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
        number = None if isinstance(value, bool | np.ndarray) else operator.index(value)  # arrays have __index__ too
    except Exception:  # an object of the caller's may raise anything
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


def items(values: object) -> list[object] | None:
    """The items of a list, tuple, array or other sequence, in its order; None if it is none.

    Text is none, though it has items, nor is a dict or a set, which have no order that means anything, nor what may be
    read only once.
    """
    if isinstance(values, AbstractSet) or not hasattr(values, "__len__"):
        return None
    return read_once(values)


def read_once(values: object) -> list[object] | None:
    """The items of anything that can be iterated but text and dicts; None if it cannot be."""
    if isinstance(values, str | bytes | bytearray | memoryview | Mapping):
        return None
    if isinstance(values, np.ndarray):
        # numpy's integers are slow to look at one by one, and a greedy loop feeds what next_tokens gave it.
        if values.ndim == 0 or values.dtype.kind == "V":
            return None
        return values.tolist() if values.ndim == 1 else list(values)
    try:
        return list(values) if isinstance(values, Iterable) else None
    except Exception:  # an object of the caller's that says it can, and cannot
        return None


def kind_of(value: object) -> str:
    """The type of a value for a message, of an array with its shape."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {list(value.shape)}"
    return type(value).__name__


def shown(value: object) -> str:
    """A value for a message: cut where it is long, and any number, which repr() refuses beyond 4,300 digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of more than 4300 digits" if isinstance(value, int) else f"an object of {type(value)}"
    except Exception:  # an object of the caller's
        return f"an object of {type(value)}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
