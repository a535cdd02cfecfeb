"""What a generation is told: how far it goes, how it chooses, where it stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from crt_export.errors import InputError, problem_list
from crt_export.runtime.counts import plain_int, read_once, shown
from crt_export.runtime.prefill import passes_problems
from crt_export.runtime.sampling import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
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

    max_new_tokens: int = 64
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop_tokens: Sequence[int | str] = ()
    stop_strings: Sequence[str] = ()
    ignore_eos: bool = False
    passes: int | Literal["adaptive", "exact"] | None = None
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Check the ranges; make numbers plain and lists tuples."""
        problems = []
        if not isinstance(self.sampling, SamplingOptions):
            problems.append(f"sampling must be SamplingOptions, found {shown(self.sampling)}")
        if not isinstance(self.ignore_eos, bool):
            problems.append(f"ignore_eos must be True or False, found {shown(self.ignore_eos)}")
        problems += self._make_plain("max_new_tokens", *_counted(self.max_new_tokens, "max_new_tokens"))
        problems += self._make_plain("passes", *passes_problems(self.passes))
        tokens, wrong = _stop_tokens("stop_tokens", self.stop_tokens)
        more, wrong_ids = _stop_tokens("stop_token_ids", self.stop_token_ids, texts=False)
        tokens = tuple(dict.fromkeys((*tokens, *more)))
        problems += self._make_plain("stop_tokens", tokens, wrong)
        problems += self._make_plain("stop_token_ids", tuple(t for t in tokens if isinstance(t, int)), wrong_ids)
        problems += self._make_plain("stop_strings", *_stop_strings(self.stop_strings))
        if problems:
            raise InputError(problem_list("generation options", problems))

    def _make_plain(self, name: str, value: object, problems: list[str]) -> list[str]:
        object.__setattr__(self, name, value)
        return problems


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


def _counted(value: object, name: str) -> tuple[int | None, list[str]]:
    number = plain_int(value)
    sound = number is not None and number >= 1
    return number, [] if sound else [f"{name} must be at least 1, found {shown(value)}"]


def _stop_tokens(name: str, tokens: object, *, texts: bool = True) -> tuple[tuple[int | str | None, ...], list[str]]:
    given = read_once(tokens)  # an iterator would be empty the second time
    if given is None:
        return (), [f"{name} must be a list of token ids such as (10,), found {shown(tokens)}"]
    plain = tuple(token if texts and isinstance(token, str) else plain_int(token) for token in given)
    wrong = [
        f"stop token {token!r} must be {wanted}"
        for token in plain
        if isinstance(token, str) and (wanted := _wanted_of_a_string(token))
    ]
    wrong += [
        f"stop token id {shown(token)} must be at least 0"
        for token, number in zip(given, plain, strict=True)
        if number is None or (isinstance(number, int) and number < 0)
    ]
    return plain, wrong


def _stop_strings(strings: object) -> tuple[tuple[str, ...], list[str]]:
    # A string is a sequence of strings too: each of its characters would stop the text.
    given = read_once(strings)
    if given is None:
        return (), [f"stop_strings must be a list of strings such as ('###',), found {shown(strings)}"]
    wrong = [(stop, wanted) for stop in given if (wanted := _wanted_of_a_string(stop))]
    plain = tuple(stop for stop in given if isinstance(stop, str))
    return plain, [f"stop string {shown(stop)} must be {wanted}" for stop, wanted in wrong]


def _wanted_of_a_string(stop: object) -> str:
    if not isinstance(stop, str) or not stop:
        return "a string of at least one character"
    try:
        stop.encode("utf-8")
    except UnicodeEncodeError:
        return "valid Unicode: it holds a lone surrogate, which no text can contain"
    return ""
