"""Prompts of a benchmark: a text the model was trained for, or random ids where there is none.

It matters: how many passes an adaptive prompt takes depends on how well the model knows the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crt_export.bundle import BundleFiles
from crt_export.config import ModelConfig
from crt_export.text import begin_rows, read_text
from crt_export.tokenizer import TOKENIZER_FILE, NoTokenizer, Tokenizer, load_tokenizer

_SEED = 1


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
    files: BundleFiles, config: ModelConfig, length: int, *, text: Path | None, tokens: Path | None
) -> PromptText:
    """The first ``length`` ids of a text file or a .npy file; without either of the text that comes with the package.

    Args:
        files: The bundle whose tokenizer reads the text.
        config: Its model; one without a tokenizer gets random ids unless ``tokens`` are given.
        length: Ids that are needed; a shorter text is repeated.
        text: A UTF-8 file.
        tokens: A .npy file with one one-dimensional array of integers.

    Raises:
        InputError, MissingDependencyError, BundleError: As :func:`crt_export.text.read_text` and a bundle's tokenizer.
    """
    if text is None and tokens is None and config.tokenizer == "none":
        return PromptText(ids=(), source="random token ids")
    tokenizer: Tokenizer = NoTokenizer()
    if tokens is None:
        content = files.content(TOKENIZER_FILE) if config.tokenizer == TOKENIZER_FILE else None
        tokenizer = load_tokenizer(files.path, config, content)
    read = read_text(config, tokenizer, text=text, tokens=tokens)
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
