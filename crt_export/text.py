"""Real text as token ids: read, checked against the vocabulary, split, and cut into sequences with their first token.

A model that was trained with a begin-of-sequence token has learnt to find it at position 0 and predicts badly without
it. So what is cut out of the middle of a text begins with it too: a window's first input is that token, its first
target the text's next one. Where the ids have the token at that place already, it is theirs, not a second one. Without
such a token nothing is put anywhere, and the first input of a window is the last target of the window before.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass, replace
from importlib.resources.abc import Traversable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from crt_export import catalog
from crt_export.config import ModelConfig
from crt_export.errors import InputError
from crt_export.models.declaration import ModelInfo
from crt_export.tokenizer import Tokenizer
from crt_export.user_files import open_input, read_input

#: Calibration takes a quarter of the text, but never less or more tokens than these.
CALIBRATION_TOKENS = (4096, 32768)
#: Validation needs at least this many tokens to be called one, see crt_export.parity.
VALIDATION_TOKENS = 4096
#: No build needs more: the text is held in memory, with all of its ids.
MOST_TEXT_BYTES, MOST_TOKENS = 2**28, 2**28
#: numpy itself refuses headers of more than 10,000 characters.
_MOST_HEADER_BYTES = 2**14
#: A target that no model predicts: the begin of the next sequence, where the ids hold several.
UNSCORED = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenText:
    """Token ids of one text.

    Attributes:
        ids: int64 [tokens], every id inside the vocabulary.
        source: Where they came from, for the report.
        offset: Index of the first id in the text they were taken from.
        bos_token_id: What every sequence cut out of it begins with, see :mod:`crt_export.text`; None: nothing.
    """

    ids: np.ndarray
    source: str
    offset: int = 0
    bos_token_id: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sha256(self) -> str:
        """Identity of the ids: SHA-256 over them as little-endian int64."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()


def read_text(
    config: ModelConfig | ModelInfo, tokenizer: Tokenizer, *, text: Path | None = None, tokens: Path | None = None
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
        ids = _checked_ids(_ids_from_npy(tokens), config, str(tokens))
        return TokenText(ids=ids, source=str(tokens), bos_token_id=config.bos_token_id)
    if config.tokenizer == "none":
        raise InputError(
            "this model has no tokenizer (config.json: tokenizer = none), so text cannot be used: "
            "give real token ids with --tokens FILE.npy (a one-dimensional integer array)"
        )
    path = catalog.default_text() if text is None else text
    source = f"default text {path.name}" if text is None else str(path)
    ids = np.asarray(tokenizer.encode(_text_from_file(path)), np.int64)
    return TokenText(ids=_checked_ids(ids, config, source), source=source, bos_token_id=config.bos_token_id)


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
    return replace(text, ids=text.ids[start:stop], offset=text.offset + start)


def _text_from_file(path: Traversable) -> str:
    try:
        # Every byte as it is, ends of lines too: a byte-level model must see them all.
        return read_input(path, most=MOST_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found an invalid byte at offset {error.start}") from None
    except OSError as error:
        raise InputError(f"{path}: the text file cannot be read ({error.strerror})") from None


def _ids_from_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, int64 [tokens] in the machine's own order of bytes.

    The header is read first and compared with the size of the file: numpy would make room for whatever it claims.
    """
    try:
        with open_input(path) as stream:
            (shape, dtype), start = _npy_header(stream, path)
            if len(shape) != 1 or dtype.kind not in "iu":
                raise InputError(f"{path}: expected a one-dimensional array of integers, found {dtype} {list(shape)}")
            count, size = shape[0], os.fstat(stream.fileno()).st_size - start
            if size != count * dtype.itemsize:
                raise InputError(
                    f"{path}: its header speaks of {count:,} ids in {count * dtype.itemsize:,} bytes, the file has "
                    f"{size:,} bytes after it: it is damaged or cut off, save it again with numpy.save"
                )
            if count > MOST_TOKENS:
                raise InputError(f"{path}: holds {count:,} ids, expected at most {MOST_TOKENS:,}: give a part of them")
            stream.seek(start)
            ids = np.frombuffer(stream.read(size), dtype)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: expected a .npy file of token ids, it cannot be read ({reason})") from None
    if len(ids) != count:
        raise InputError(f"{path}: was cut off while it was read")
    return ids.astype(dtype.newbyteorder("="), copy=False)


def _npy_header(stream: BinaryIO, path: Path) -> tuple[tuple[tuple[int, ...], np.dtype[Any]], int]:
    """Shape and dtype, as a file claims them, and where its data begin."""
    head = BytesIO(stream.read(_MOST_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(head)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote, and of damaged ones
            shape, _, dtype = read(head)
        if dtype.hasobject or any(not 0 <= size < 2**63 for size in shape):
            raise ValueError
    except Exception:  # numpy evaluates the header as Python, and lets through whatever that raises
        raise InputError(
            f"{path}: expected a .npy file of token ids, found something unreadable; text goes to --text"
        ) from None
    return (shape, dtype), head.tell()


def _checked_ids(ids: np.ndarray, config: ModelConfig | ModelInfo, source: str) -> np.ndarray:
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Consecutive windows, one behind the other, int64 [tokens] each.

    Attributes:
        inputs: What is fed.
        targets: What comes next; ``UNSCORED`` where that is the begin-of-sequence token.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]


def cut_sequences(
    ids: NDArray[np.int64], *, tokens: int, window: int, bos: int | None, start: int = 0
) -> Sequences | int:
    """Cut consecutive windows out of a text.

    Args:
        ids: The text, int64 [n].
        tokens: Tokens to feed and to predict, in all; the last window ends early where they are no multiple.
        window: Tokens of a window.
        bos: The model's begin-of-sequence token; None if it has none.
        start: Index of the text's first token that is used.

    Returns:
        The windows; where the text is too short, how many tokens it needs to have.
    """
    starts = _first_targets(ids, -(-tokens // window), window, bos, start)
    predicted = (starts[:, None] + np.arange(window)).ravel()[:tokens]
    if predicted[-1] >= len(ids):
        return int(predicted[-1]) + 1
    inputs, targets = ids[predicted - 1].astype(np.int64), ids[predicted].astype(np.int64)
    if bos is not None:
        inputs[::window] = bos
        targets[targets == bos] = UNSCORED
    return Sequences(inputs=inputs, targets=targets)


def fill_unscored(nll: NDArray[np.float64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Likelihoods in which an unscored target has the mean of its window's others, so that no mean over it changes.

    Args:
        nll: Negative log-likelihoods, nats [..., windows, positions]; anything where the target is unscored.
        targets: int64 [windows, positions].
    """
    scored = targets != UNSCORED
    if scored.all():
        return nll
    count = np.maximum(scored.sum(axis=-1, keepdims=True), 1)
    return np.where(scored, nll, np.where(scored, nll, 0.0).sum(axis=-1, keepdims=True) / count)


def begin_rows(rows: NDArray[np.int64], bos: int | None) -> NDArray[np.int64]:
    """Rows of the same length that begin with the token; one that does not yet is moved by one and loses its last.

    Args:
        rows: Pieces of a text, int64 [rows, seq].
        bos: The model's begin-of-sequence token; None if it has none.
    """
    if bos is None:
        return rows
    moved = np.concatenate([np.full_like(rows[:, :1], bos), rows[:, :-1]], axis=1)
    return np.where(rows[:, :1] == bos, rows, moved)


def _first_targets(ids: NDArray[np.int64], count: int, window: int, bos: int | None, start: int) -> NDArray[np.int64]:
    """Index of the first token that each window predicts."""
    if bos is None:
        return start + 1 + np.arange(count) * window
    found, target = [], start
    for _ in range(count):
        while target < len(ids) and ids[target] == bos:
            target += 1
        found.append(target)
        target += window
    return np.array(found)
