"""Options that check themselves: a table of rules for each class, one form of sentence, all problems in one error.

::

    @dataclass(frozen=True, kw_only=True)
    class Draw(Checked):
        HEADING: ClassVar[str] = "sampling options"
        RULES: ClassVar[Rules] = {
            "top_p": Rule(plain_float, "above 0 and at most 1", lambda value: 0 < value <= 1),
            "seed": whole("between 0 and 9", least=0, most=9),
            "mode": choice("fast", "exact"),
        }
        top_p: float = 1.0
        seed: int = 0
        mode: str = "fast"

``Draw(seed=-1)`` raises ``InputError: sampling options: seed must be between 0 and 9, found -1``. A field without a
rule is taken as it is. Rules between fields are :meth:`Checked.conflicts`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

from crt_export.errors import InputError, problem_list

_SHOWN = 80


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


def plain_text(value: object) -> str | None:
    """The text; None if it is none."""
    return value if isinstance(value, str) else None


def whole_number(name: str, value: int, *, least: int = 1, most: int | None = None, limit: str = "") -> int:
    """The argument of a call as a whole number.

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
        # Arrays have __index__ too.
        number = None if isinstance(value, bool) or hasattr(value, "__len__") else operator.index(value)
    except Exception:  # an object of the caller's may raise anything
        number = None
    if number is None:
        raise InputError(f"{name} must be a whole number, found {shown(value)}")
    if number < least or (most is not None and number > most):
        upper = f" and at most {most}{limit}" if most is not None else ""
        raise InputError(f"{name} must be at least {least}{upper}, found {shown(number)}")
    return number


def shown(value: object) -> str:
    """A value for a message: cut where it is long, and any number, which repr() refuses beyond 4,300 digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of more than 4300 digits" if isinstance(value, int) else f"an object of {type(value)}"
    except Exception:  # an object of the caller's
        return f"an object of {type(value)}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@dataclass(frozen=True)
class Rule:
    """What one field takes.

    Attributes:
        kind: Gives the value as a plain one of its kind, None where it is of another.
        words: What is allowed, after "must be".
        allowed: Whether a plain value is in its range.
        optional: Whether None is allowed, and kept.
    """

    kind: Callable[[Any], Any]
    words: str
    allowed: Callable[[Any], bool] = lambda value: True
    optional: bool = False


Rules = Mapping[str, Rule]


def whole(words: str, *, least: int, most: float = math.inf, optional: bool = False) -> Rule:
    """A whole number from ``least`` to ``most``."""
    return Rule(plain_int, words, lambda value: least <= value <= most, optional)


def choice(*values: str) -> Rule:
    """One of some texts."""
    return Rule(plain_text, f"one of {', '.join(values)}", lambda value: value in values)


#: True or False, and nothing that merely counts as one of them.
FLAG = Rule(lambda value: value if isinstance(value, bool) else None, "true or false")


class Checked:
    """Base of frozen dataclasses that cannot be made with impossible values.

    Attributes:
        HEADING: What an error calls the whole.
        RULES: Field to what it takes.
        PREFIX: What precedes a field's name in a sentence.

    Raises:
        InputError: A value is impossible, or two exclude each other; lists every problem.
    """

    HEADING: ClassVar[str] = "options"
    RULES: ClassVar[Rules] = {}
    PREFIX: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check every field, and make its value a plain one."""
        plain, problems = self.judge({name: getattr(self, name) for name in _fields(type(self))})
        if problems:
            raise InputError(problem_list(self.heading(), problems))
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def heading(self) -> str:
        """What an error calls this one."""
        return self.HEADING

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterable[str]:
        """What is wrong between the values that are right on their own; absent ones are not judged."""
        del values
        return ()

    @classmethod
    def judge(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Check some fields.

        Args:
            values: Field to value, of any type; absent fields are not judged.

        Returns:
            The plain values that are right on their own, and one sentence for each problem.
        """
        plain, problems = {}, []
        for name, given in values.items():
            rule = cls.RULES.get(name)
            if rule is None or (given is None and rule.optional):
                plain[name] = given
            elif (value := rule.kind(given)) is not None and rule.allowed(value):
                plain[name] = value
            else:
                problems.append(f"{cls.PREFIX}{name} must be {rule.words}, found {shown(given)}")
        return plain, [*problems, *cls.conflicts(plain)]

    @classmethod
    def unknown_keys(cls, keys: Iterable[str]) -> list[str]:
        """One sentence for each key that is no field, with the nearest field."""
        fields, problems = _fields(cls), []
        for key in keys:
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                problems.append(f"unknown key {cls.PREFIX + key!r}{hint}")
        return problems


def _fields(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]
