"""Token by token: the loop around a session, and the same as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from crt_export.errors import InputError, problem_list
from crt_export.runtime.sampling import SamplingOptions, sample_token

MAX_NEW_TOKENS = "max_new_tokens"
STOP_TOKEN = "stop_token"


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How far a generation goes and how it chooses.

    Attributes:
        max_new_tokens: Most tokens per row.
        sampling: How a token is chosen; greedy by default.
        stop_token_ids: Tokens that end a row, besides the model's end-of-sequence token.
        ignore_eos: Go on after the model's end-of-sequence token.

    Raises:
        InputError: A value is out of its range; lists every problem.
    """

    max_new_tokens: int = 64
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        problems = []
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, found {self.max_new_tokens!r}")
        problems += [f"stop token id {token!r} must be at least 0" for token in self.stop_token_ids if token < 0]
        if problems:
            raise InputError(problem_list("generation options", problems))


class GeneratingSession(Protocol):
    """What a generation needs of a session."""

    batch: int
    eos_token_id: int | None

    def prefill(self, rows: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Append tokens to every row; logits [batch, vocab]."""
        ...

    def step(self, tokens: Sequence[int | None] | np.ndarray) -> np.ndarray:
        """Append one token per row, None for none; logits [batch, vocab]."""
        ...


class Generation(Iterator[list[int | None]]):
    """Each ``next()`` gives one new token per row, None for a row that has stopped.

    A stop token ends its row and is not given out. A stopped row is frozen: nothing of it is written any
    more. The last token given out has not been fed to the model.

    Attributes:
        tokens: The new tokens of every row so far.
        stop_reasons: Per row ``max_new_tokens`` or ``stop_token``; None while it runs.
        prompt_tokens: Length of every prompt.
    """

    def __init__(self, session: GeneratingSession, prompts: Sequence[np.ndarray], options: GenerationOptions) -> None:
        """Prepare; the model runs when the iterator is read."""
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.stop_reasons: list[str | None] = [None for _ in prompts]
        self.prompt_tokens = [len(prompt) for prompt in prompts]
        self._session = session
        self._options = options
        stops = set(options.stop_token_ids)
        if session.eos_token_id is not None and not options.ignore_eos:
            stops.add(session.eos_token_id)
        self._stops = frozenset(stops)
        self._prompts: Sequence[np.ndarray] | None = prompts
        self._last: list[int | None] = []

    def __next__(self) -> list[int | None]:
        """Run the model once and choose a token per row."""
        if all(self.stop_reasons):
            raise StopIteration
        if self._prompts is not None:
            logits = self._session.prefill(self._prompts)
            self._prompts = None
        else:
            logits = self._session.step(self._last)
        given = [self._choose(row, logits[row]) for row in range(len(self.tokens))]
        # A row that has just used up its tokens gives its last one out and is not fed any more.
        self._last = [None if self.stop_reasons[row] else token for row, token in enumerate(given)]
        if all(token is None for token in given):
            raise StopIteration
        return given

    def _choose(self, row: int, logits: np.ndarray) -> int | None:
        if self.stop_reasons[row]:
            return None
        drawn = len(self.tokens[row])
        token = sample_token(logits, self._options.sampling, row=row, step=drawn)
        if token in self._stops:
            self.stop_reasons[row] = STOP_TOKEN
            return None
        self.tokens[row].append(token)
        if drawn + 1 == self._options.max_new_tokens:
            self.stop_reasons[row] = MAX_NEW_TOKENS
        return token
