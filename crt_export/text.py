"""Real text as token ids: read, checked against the vocabulary, and split into a calibration and a validation part."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np

from crt_export import catalog
from crt_export.config import ModelConfig
from crt_export.errors import InputError
from crt_export.tokenizer import Tokenizer

#: Calibration takes a quarter of the text, but never less or more tokens than these.
CALIBRATION_TOKENS = (4096, 32768)
#: Validation needs at least this many tokens to be called one, see crt_export.parity.
VALIDATION_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenText:
    """Token ids of one text.

    Attributes:
        ids: int64 [tokens], every id inside the vocabulary.
        source: Where they came from, for the report.
        offset: Index of the first id in the text they were taken from.
    """

    ids: np.ndarray
    source: str
    offset: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sha256(self) -> str:
        """Identity of the ids: SHA-256 over them as little-endian int64."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()


def read_text(
    config: ModelConfig, tokenizer: Tokenizer, *, text: Path | None = None, tokens: Path | None = None
) -> TokenText:
    """Read a UTF-8 text file or a .npy file of ids; without either, the text that comes with the package.

    Args:
        config: The model the ids are for.
        tokenizer: Turns text into ids.
        text: A UTF-8 file.
        tokens: A .npy file with one one-dimensional array of integers.

    Raises:
        InputError: Both are given, a file is unreadable or empty, an id is outside the vocabulary, or the model has no
            tokenizer and no ids are given.
    """
    if text is not None and tokens is not None:
        raise InputError("give either a text file (--text) or token ids (--tokens), not both")
    if tokens is not None:
        return TokenText(ids=_checked_ids(_ids_from_npy(tokens), config, str(tokens)), source=str(tokens))
    if config.tokenizer == "none":
        raise InputError(
            "this model has no tokenizer (config.json: tokenizer = none), so text cannot be used: "
            "give real token ids with --tokens FILE.npy (a one-dimensional integer array)"
        )
    path = catalog.default_text() if text is None else text
    source = f"default text {path.name}" if text is None else str(path)
    ids = np.asarray(tokenizer.encode(_text_from_file(path)), np.int64)
    return TokenText(ids=_checked_ids(ids, config, source), source=source)


def split_text(
    text: TokenText, *, calibrate: bool, validate: bool = True, validation_tokens: int = VALIDATION_TOKENS
) -> tuple[TokenText | None, TokenText]:
    """Split off a calibration part at the start, so that no token is calibrated and validated on.

    Args:
        text: The whole text.
        calibrate: Whether a calibration part is needed at all; if not, everything validates.
        validate: Whether a validation part is needed; if not, it may be as short as it happens to be.
        validation_tokens: Tokens to predict in the validation part, at least.

    Returns:
        The calibration part (a quarter of the text within ``CALIBRATION_TOKENS``) or None, and the validation part.

    Raises:
        InputError: The text is too short for what is needed.
    """
    low, high = CALIBRATION_TOKENS
    first, second = low if calibrate else 0, validation_tokens + 1 if validate else 0
    if len(text) < first + second:
        purposes = [f"calibration needs {first}"] if first else []
        purposes += [f"validation needs {second}{' of its own' if first else ''}"] if second else []
        raise InputError(
            f"{text.source}: {len(text)} tokens are too few: {' and '.join(purposes)}, so give at least "
            f"{first + second} (--text FILE or --tokens FILE.npy)"
        )
    if not calibrate:
        return None, text
    count = min(max(len(text) // 4, low), high, len(text) - second)
    return _part(text, 0, count), _part(text, count, len(text))


def _part(text: TokenText, start: int, stop: int) -> TokenText:
    return TokenText(ids=text.ids[start:stop], source=text.source, offset=text.offset + start)


def _text_from_file(path: Traversable) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # every byte of it: a byte-level model must see them all
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found an invalid byte at offset {error.start}") from None
    except OSError as error:
        raise InputError(f"{path}: the text file cannot be read ({error.strerror})") from None


def _ids_from_npy(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: expected a .npy file of token ids, found something unreadable ({error})") from None
    except (ValueError, EOFError):  # numpy's own words recommend pickle
        raise InputError(
            f"{path}: expected a .npy file of token ids, found something unreadable; text goes to --text"
        ) from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive of arrays"
        raise InputError(f"{path}: expected a one-dimensional array of integers, found {found}")
    return ids


def _checked_ids(ids: np.ndarray, config: ModelConfig, source: str) -> np.ndarray:
    if not ids.size:
        raise InputError(f"{source}: holds no tokens")
    outside = (ids < 0) | (ids >= config.vocab_size)
    if outside.any():
        first = int(np.argmax(outside))
        raise InputError(
            f"{source}: {int(outside.sum())} token ids are outside the vocabulary [0, {config.vocab_size}), "
            f"the first is {int(ids[first])} at index {first}"
        )
    return ids.astype(np.int64)
