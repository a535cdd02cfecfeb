"""What applications pass, made plain: numbers of numpy's keep their width, and overflow later; lists may be none."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

import numpy as np

from crt_export.checked import plain_float as plain_float
from crt_export.checked import plain_int as plain_int
from crt_export.checked import shown as shown
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
