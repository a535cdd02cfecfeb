"""Options of a generation: how far it goes, how it chooses, where it stops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from crt_export.checked import FLAG, Checked, Rule, Rules, plain_int, shown, whole
from crt_export.errors import InputError
from crt_export.runtime.prefill import WORDS
from crt_export.runtime.rows import read_once
from crt_export.runtime.sampling import SamplingOptions


def _plain_items(values: object) -> tuple[object, ...] | None:
    """The items, whole numbers as Python's own; an iterator would be empty the second time."""
    given = read_once(values)
    if given is None:
        return None
    return tuple(item if (number := plain_int(item)) is None else number for item in given)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(Checked):
    """How far a generation goes and how it chooses.

    Any iterable of stop tokens or stop strings is taken, and kept as a tuple.

    A special token of the model's tokenizer gives no text, so a stop string that is exactly one of them stops where the
    token comes, as a stop token does.

    Attributes:
        max_new_tokens: Most tokens per row.
        sampling: How a token is chosen; greedy by default.
        stop_tokens: Tokens that end a row, besides the model's end-of-sequence tokens: ids, or the text of a special
            token of the model's tokenizer.
        stop_strings: Texts that end a row as soon as its new text contains one; need a model with tokenizer.
        ignore_eos: Go on after the model's end-of-sequence tokens.
        passes: How prompts are taken, see ``Session.prefill``: a number of passes, ``"adaptive"``, ``"exact"``, or None
            for the target's own choice.
        stop_token_ids: Alias of ``stop_tokens`` for ids: what is given here is added there, and it holds the ids of
            ``stop_tokens``.

    Raises:
        InputError: A value is out of its range; lists every problem.
    """

    HEADING: ClassVar[str] = "generation options"
    RULES: ClassVar[Rules] = {
        "max_new_tokens": whole("at least 1", least=1),
        "sampling": Rule(lambda value: value if isinstance(value, SamplingOptions) else None, "SamplingOptions"),
        "stop_tokens": Rule(_plain_items, "a list of token ids such as (10,)"),
        # A string is a sequence of strings too: each of its characters would stop the text.
        "stop_strings": Rule(_plain_items, "a list of strings such as ('###',)"),
        "ignore_eos": FLAG,
        "passes": Rule(
            lambda value: value if isinstance(value, str) and value in WORDS else plain_int(value),
            "at least 1, 'adaptive' or 'exact' (None: the target's own choice)",
            lambda value: isinstance(value, str) or value >= 1,
            optional=True,
        ),
        "stop_token_ids": Rule(_plain_items, "a list of token ids such as (10,)"),
    }

    max_new_tokens: int = 64
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop_tokens: Sequence[int | str] = ()
    stop_strings: Sequence[str] = ()
    ignore_eos: bool = False
    passes: int | Literal["adaptive", "exact"] | None = None
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Check the values; make numbers plain and lists tuples."""
        super().__post_init__()
        tokens = tuple(dict.fromkeys((*self.stop_tokens, *self.stop_token_ids)))
        object.__setattr__(self, "stop_tokens", tokens)
        object.__setattr__(self, "stop_token_ids", tuple(token for token in tokens if isinstance(token, int)))

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with single stop tokens and stop strings."""
        for token in values.get("stop_tokens", ()):
            if isinstance(token, str) and (wanted := _wanted_of_a_string(token)):
                yield f"stop token {token!r} must be {wanted}"
        ids = [token for token in values.get("stop_tokens", ()) if not isinstance(token, str)]
        for token in (*ids, *values.get("stop_token_ids", ())):
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                yield f"stop token id {shown(token)} must be at least 0"
        for stop in values.get("stop_strings", ()):
            if wanted := _wanted_of_a_string(stop):
                yield f"stop string {shown(stop)} must be {wanted}"


def checked_options(options: GenerationOptions | None) -> GenerationOptions:
    """The options, or the defaults for None.

    Raises:
        InputError: They are something else, such as a dict.
    """
    if options is None:
        return GenerationOptions()
    if not isinstance(options, GenerationOptions):
        raise InputError(f"options must be GenerationOptions(max_new_tokens=...) or None, found {shown(options)}")
    return options


def _wanted_of_a_string(stop: object) -> str:
    if not isinstance(stop, str) or not stop:
        return "a string of at least one character"
    try:
        stop.encode("utf-8")
    except UnicodeEncodeError:
        return "valid Unicode: it holds a lone surrogate, which no text can contain"
    return ""
