"""Options of a parity check, and the consecutive windows of held-out text, all of one length."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from crt_export.errors import InputError, problem_list
from crt_export.parity.levels import LEVELS
from crt_export.text import VALIDATION_TOKENS, TokenText, cut_sequences

DEFAULT_WINDOW = 256
LONG_RUN_TOKENS = 20_480
#: What a build must pass; the certificate and the long run take longer and are asked for.
BUILD_LEVELS = ("contract", "one-step", "chain", "corpus", "free-running")

_SMALLEST = {
    "validation_tokens": 2,
    "window": 2,
    "window_batch": 1,
    "threads": 0,
    "chain_windows": 1,
    "chain_steps": 2,
    "prompts": 1,
    "new_tokens": 1,
    "long_run_tokens": 2000,
}


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """How much is measured.

    Attributes:
        validation_tokens: Tokens scored in each regime, rounded up to whole windows.
        window: Tokens per window, each a step of the teacher-forced chain; a smaller capacity shortens it.
        window_batch: Most windows per call.
        short_reason: Why fewer than 4,096 tokens or windows below 256 tokens are enough; part of the report.
        threads: CPU threads of ONNX Runtime, 0 for as many as PyTorch uses.
        levels: Which levels run, of ``LEVELS``.
        chain_windows: Windows of the chain level, each of ``chain_steps`` teacher-forced steps.
        chain_steps: Steps of the chain level.
        prompts: Prompts of the free-running level.
        new_tokens: Tokens that each prompt is continued by.
        long_run_tokens: Tokens of the long-run level.

    Raises:
        InputError: A value is impossible, or a short run has no reason.
    """

    validation_tokens: int = VALIDATION_TOKENS
    window: int = DEFAULT_WINDOW
    window_batch: int = 32
    short_reason: str = ""
    threads: int = 0
    levels: tuple[str, ...] = BUILD_LEVELS
    chain_windows: int = 4
    chain_steps: int = 64
    prompts: int = 32
    new_tokens: int = 64
    long_run_tokens: int = LONG_RUN_TOKENS

    def __post_init__(self) -> None:
        """Check the values."""
        problems = [
            f"{name} must be an integer of at least {low}, found {getattr(self, name)!r}"
            for name, low in _SMALLEST.items()
            if type(getattr(self, name)) is not int or getattr(self, name) < low
        ]
        unknown = [name for name in self.levels if name not in LEVELS]
        problems += [f"level must be one of {', '.join(LEVELS)}, found {name!r}" for name in unknown]
        if not self.levels:
            problems.append("at least one level is needed, found none")
        if not problems and not self.short_reason.strip():
            problems = [
                f"{name} must be at least {low}, found {value}: fewer say too little about a model "
                "(from Python, short_reason can state why fewer are enough)"
                for name, value, low in (
                    ("validation_tokens", self.validation_tokens, VALIDATION_TOKENS),
                    ("window", self.window, DEFAULT_WINDOW),
                )
                if value < low
            ]
        if problems:
            raise InputError(problem_list("parity options", problems))


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Consecutive windows.

    Attributes:
        inputs: What is fed, int64 [windows, length]; a window begins with the model's begin-of-sequence token, if it
            has one, else with the last target of the window before.
        targets: The text's token after each one that is fed, int64 [windows, length]; ``UNSCORED`` where a sequence
            begins.
        text: The text they are from.
        notes: Sentences on what was shortened and why.
    """

    inputs: np.ndarray
    targets: np.ndarray
    text: TokenText
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of windows."""
        return self.inputs.shape[0]

    @property
    def length(self) -> int:
        """Tokens fed, and predictions scored, per window."""
        return self.inputs.shape[1]

    def part(self, *, windows: int | None = None, length: int | None = None) -> Windows:
        """The first windows, or the first tokens of each."""
        rows = slice(windows), slice(length)
        return dataclasses.replace(
            self,
            inputs=np.ascontiguousarray(self.inputs[rows]),
            targets=np.ascontiguousarray(self.targets[rows]),
        )


def windows_from_text(text: TokenText, options: ParityOptions, *, longest: int, longest_reason: str) -> Windows:
    """Cut the text into consecutive windows.

    Args:
        text: Held-out text.
        options: How much of it.
        longest: Most tokens that every target can take from position 0.
        longest_reason: What sets that limit, for the report.

    Raises:
        InputError: The text is too short; the message says what is needed.
    """
    length = min(options.window, longest)
    if length < 2:
        raise InputError(
            f"{longest_reason}: parity needs windows of at least 2 tokens, one for prefill and one to step"
        )
    count = max(2, -(-options.validation_tokens // length))
    cut = cut_sequences(text.ids, tokens=count * length, window=length, bos=text.bos_token_id)
    if isinstance(cut, int):
        raise InputError(
            f"{text.source}: {len(text)} tokens are too few to validate on: {count} windows of {length} tokens and one "
            f"more to predict need {cut} (--text FILE or --tokens FILE.npy)"
        )
    notes = [f"windows of {length} tokens instead of {options.window}: {longest_reason}"] * (length < options.window)
    if options.short_reason.strip():
        notes.append(f"{count} windows of {length} tokens: {options.short_reason.strip()}")
    if text.bos_token_id is not None:
        notes.append(f"every window and prompt begins with the model's bos_token_id {text.bos_token_id}")
    inputs, targets = (part.reshape(count, length) for part in (cut.inputs, cut.targets))
    return Windows(inputs=inputs, targets=targets, text=text, notes=tuple(notes))
