"""Runner of a candidate that is open in its worker process, and the prompts that all are given.

A prompt is the beginning of a text the model was trained for, or random ids where there is none. It matters: how many
passes an adaptive prompt takes depends on how well the model knows the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from crt_export.bundle import BundleFiles
from crt_export.models.declaration import ModelInfo
from crt_export.text import begin_rows, read_text
from crt_export.tokenizer import TOKENIZER_FILE, NoTokenizer, Tokenizer, load_tokenizer

#: How a prompt is fed: None is the candidate's own choice, a number that many passes, or ``adaptive``, ``exact``.
Passes = int | str | None
_SEED = 1


@dataclass(frozen=True, kw_only=True)
class CandidateInfo:
    """What the report needs to know of an opened candidate.

    Attributes:
        weight_file: Size in bytes of the file its weights came from; None where there is none.
        weights: Bytes of weights that a step reads; None where that is not known.
        notes: What a reader must know, one sentence each.
    """

    weight_file: int | None
    weights: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """A block of steps.

    Attributes:
        seconds: How long each step took.
        engine: The part of it inside the engine's run call; empty where that is not known.
    """

    seconds: Sequence[float]
    engine: Sequence[float] = field(default_factory=tuple)


class Runner(Protocol):
    """One candidate, its libraries imported; it is opened by open()."""

    def weight_path(self) -> Path | None:
        """The file that open() will read weights from."""
        ...

    def open(self) -> None:
        """Get ready for the first token."""
        ...

    def first_token(self) -> None:
        """Feed one token to every row of what open() made, and wait for the logits."""
        ...

    def info(self) -> CandidateInfo:
        """What the report needs to know; after open()."""
        ...

    def steps(self, position: int, warmups: int, count: int) -> StepTimes:
        """Feed tokens one at a time, each the likeliest after the one before.

        Args:
            position: Tokens in the cache before the first one that is timed.
            warmups: Steps before that.
            count: Steps that are timed.
        """
        ...

    def prefill(self, tokens: int, passes: Passes) -> float:
        """Feed a prompt to empty caches; the seconds until its last logits are there.

        Raises:
            UnsupportedError, InputError: The candidate has no such method.
        """
        ...

    def open_second_session(self) -> None:
        """Open another session on the same weights, and feed it one token."""
        ...

    def close_second_session(self) -> None:
        """Close it again."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...


def block_start(position: int, warmups: int) -> int:
    """Where the caches stand before the warm-up steps that lead to a position."""
    return max(0, position - warmups)


@dataclass(frozen=True, kw_only=True)
class PromptText:
    """Where prompts come from.

    Attributes:
        ids: Token ids they are the beginning of; empty: random ones.
        source: In words, for the report.
    """

    ids: tuple[int, ...]
    source: str


def prompt_text(
    files: BundleFiles, model: ModelInfo, length: int, *, text: Path | None, tokens: Path | None
) -> PromptText:
    """The first ``length`` ids of a text file or a .npy file; without either of the text that comes with the package.

    Args:
        files: The bundle whose tokenizer reads the text.
        model: Its model; one without a tokenizer gets random ids unless ``tokens`` are given.
        length: Ids that are needed; a shorter text is repeated.
        text: A UTF-8 file.
        tokens: A .npy file with one one-dimensional array of integers.

    Raises:
        InputError, MissingDependencyError, BundleError: As :func:`crt_export.text.read_text` and a bundle's tokenizer.
    """
    if text is None and tokens is None and model.tokenizer == "none":
        return PromptText(ids=(), source="random token ids")
    tokenizer: Tokenizer = NoTokenizer()
    if tokens is None:
        content = files.content(TOKENIZER_FILE) if model.tokenizer == TOKENIZER_FILE else None
        tokenizer = load_tokenizer(files.path, model, content)
    read = read_text(model, tokenizer, text=text, tokens=tokens)
    return PromptText(ids=tuple(read.ids[:length].tolist()), source=read.source)


def prompt_rows(
    text: Sequence[int], vocab_size: int, *, batch: int, tokens: int, bos: int | None = None
) -> NDArray[np.int64]:
    """Prompts of one length, int64 [batch, tokens]: successive pieces of the text, or random ids, always the same.

    Each begins with the model's begin-of-sequence token ``bos``, if it has one.
    """
    if text:
        rows = np.take(np.array(text, np.int64), np.arange(batch * tokens), mode="wrap").reshape(batch, tokens)
    else:
        rows = np.random.default_rng(_SEED).integers(vocab_size, size=(batch, tokens))
    return begin_rows(rows, bos)
