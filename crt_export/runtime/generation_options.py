"""What a generation is told: how far it goes, how it chooses, where it stops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral

from crt_export.errors import InputError, problem_list
from crt_export.runtime.sampling import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How far a generation goes and how it chooses.

    Attributes:
        max_new_tokens: Most tokens per row.
        sampling: How a token is chosen; greedy by default.
        stop_token_ids: Tokens that end a row, besides the model's end-of-sequence token.
        stop_strings: Texts that end a row as soon as its new text contains one; need a model with tokenizer.
        ignore_eos: Go on after the model's end-of-sequence token.
        passes: Passes of the prefill, see ``Session.prefill``; None takes the unrolled graph.

    Raises:
        InputError: A value is out of its range; lists every problem.
    """

    max_new_tokens: int = 64
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop_token_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    ignore_eos: bool = False
    passes: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        problems = []
        if not _whole(self.max_new_tokens, least=1):
            problems.append(f"max_new_tokens must be at least 1, found {self.max_new_tokens!r}")
        if not isinstance(self.sampling, SamplingOptions):
            problems.append(f"sampling must be SamplingOptions, found {self.sampling!r}")
        problems += _stop_token_problems(self.stop_token_ids)
        problems += _stop_string_problems(self.stop_strings)
        if not isinstance(self.ignore_eos, bool):
            problems.append(f"ignore_eos must be True or False, found {self.ignore_eos!r}")
        if self.passes is not None and not _whole(self.passes, least=1):
            problems.append(f"passes must be at least 1 (None takes the unrolled graph), found {self.passes!r}")
        if problems:
            raise InputError(problem_list("generation options", problems))


def _stop_token_problems(tokens: object) -> list[str]:
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        return [f"stop_token_ids must be a list of token ids such as (10,), found {tokens!r}"]
    return [f"stop token id {token!r} must be at least 0" for token in tokens if not _whole(token, least=0)]


def _stop_string_problems(strings: object) -> list[str]:
    # A string is a sequence of strings too: each of its characters would stop the text.
    if isinstance(strings, str | bytes) or not isinstance(strings, Sequence):
        return [f"stop_strings must be a list of strings such as ('###',), found {strings!r}"]
    return [f"stop string {stop!r} must be {wanted}" for stop in strings if (wanted := _wanted_of_a_string(stop))]


def _wanted_of_a_string(stop: object) -> str:
    if not isinstance(stop, str) or not stop:
        return "a string of at least one character"
    try:
        stop.encode("utf-8")
    except UnicodeEncodeError:
        return "valid Unicode: it holds a lone surrogate, which no text can contain"
    return ""


def _whole(value: object, *, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
