"""Tokenizers, from text to token ids and back: bytes, a ``tokenizer.json``, or none at all.

Imports neither torch nor a runtime; the ``tokenizers`` library is imported only for a ``tokenizer.json``.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from crt_export.config import BYTE_VOCABULARY, ModelConfig
from crt_export.errors import CheckpointError, InputError
from crt_export.models.declaration import ModelInfo
from crt_export.text_stream import ByteStream, LibraryText, TextStream
from crt_export.tokenizer_file import TokenizerFile

TOKENIZER_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """What every tokenizer offers. ``vocab_size`` counts the ids it can produce (0: it has none)."""

    @property
    def name(self) -> str:
        """The value of ``tokenizer`` in config.json."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer can produce."""
        ...

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of the text alone, without begin-of-sequence token.

        Args:
            text: Any text with a UTF-8 form.
            parse_special: Whether text that spells a special token becomes that token; else it is text like any other.
        """
        ...

    def encode_prompt(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of a prompt: ``bos_token_id`` (if the model has one) once, then the text; arguments as for encode()."""
        ...

    def special_token_id(self, text: str) -> int | None:
        """Id of the special token that this text spells; None if it spells none."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; begin- and end-of-sequence tokens give none.

        Raises:
            InputError: These are no token ids.
        """
        ...

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """An incremental decoder of what follows other ids: decode(context + ids) less the text of the context."""
        ...


class ByteTokenizer:
    """One id per UTF-8 byte (0..255); ids from 256 on belong to the model's special tokens."""

    name = "byte"
    vocab_size = BYTE_VOCABULARY

    def __init__(self, config: ModelConfig | ModelInfo) -> None:
        """Take the special tokens from the configuration."""
        self._bos = config.bos_token_id
        # Only ids outside the byte range are silent: a model may use byte 0 to end a sequence and print it
        # too.
        self._silent = frozenset(token for token in config.special_token_ids if token >= BYTE_VOCABULARY)

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """UTF-8 bytes of the text; no text spells a special token.

        Raises:
            InputError: That is no text, or holds lone surrogates, which have no UTF-8 form.
        """
        return list(_checked_utf8(text, parse_special))

    def encode_prompt(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Begin-of-sequence id, if the model has one, then the bytes."""
        return begun(self.encode(text, parse_special=parse_special), self._bos)

    def special_token_id(self, text: str) -> int | None:
        """None: special tokens have no text."""
        return None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes; what is not valid UTF-8 becomes U+FFFD."""
        stream = self.stream()
        return "".join([*(stream.push(token_id) for token_id in _checked_ids(ids)), stream.finish()])

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """An incremental UTF-8 decoder of what follows other ids."""
        return ByteStream(self._silent, _checked_ids(context))


class FileTokenizer:
    """A ``tokenizer.json`` read by the ``tokenizers`` library."""

    name = TOKENIZER_FILE

    def __init__(self, path: Path, config: ModelConfig | ModelInfo, content: bytes | None = None) -> None:
        """Read the file, or its content where that was read before.

        Raises:
            MissingDependencyError: The ``tokenizers`` library is not installed.
            CheckpointError: The file is missing or damaged, or has ids the model has no embedding for.
        """
        self._library = TokenizerFile(path, content)
        self._bos = config.bos_token_id
        # What else ends a sequence, a line break say, is text all the same.
        silent = config.special_token_ids & frozenset(self._library.special_tokens.values())
        self._text = LibraryText(self._library, silent)
        self.vocab_size = self._library.vocab_size
        if self.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{path}: has {self.vocab_size} tokens, more than the model's vocab_size "
                f"{config.vocab_size}; use the tokenizer the model was trained with"
            )

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of the text; nothing is put before or behind it, whatever the file says.

        Raises:
            InputError: That is no text, holds lone surrogates, which have no UTF-8 form, or the library cannot encode
                it.
        """
        _checked_utf8(text, parse_special)
        return self._library.encode_ids(text, parse_special=parse_special)

    def encode_prompt(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Begin-of-sequence id, if the model has one, then the text's ids; once, where the text begins with it too."""
        return begun(self.encode(text, parse_special=parse_special), self._bos)

    def special_token_id(self, text: str) -> int | None:
        """Id of the special token that this text spells; None if it spells none."""
        return self._library.special_tokens.get(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without special tokens."""
        return self._text.decode(_checked_ids(ids))

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """An incremental decoder of what follows other ids."""
        return self._text.stream(_checked_ids(context))


class NoTokenizer:
    """A model that speaks token ids only: every text is refused."""

    name = "none"
    vocab_size = 0

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Refuse.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "this model has no tokenizer (config.json: tokenizer = none); give token ids, for example --tokens FILE.npy"
        )

    def encode_prompt(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Refuse, as encode() does."""
        return self.encode(text)

    def special_token_id(self, text: str) -> int | None:
        """None: there is no text."""
        return None

    def decode(self, ids: Iterable[int]) -> str:
        """Refuse.

        Raises:
            InputError: Always.
        """
        raise InputError("this model has no tokenizer (config.json: tokenizer = none); use the token ids themselves")

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """Refuse, as decode() does."""
        self.decode(())
        raise AssertionError("decode() of a model without tokenizer always raises")


def load_tokenizer(folder: str | Path, config: ModelConfig | ModelInfo, content: bytes | None = None) -> Tokenizer:
    """The tokenizer that ``config.tokenizer`` names.

    Args:
        folder: Checkpoint or bundle folder; holds ``tokenizer.json`` if the configuration names it.
        config: The model's configuration, or what a bundle says about the model.
        content: Content of ``tokenizer.json``, where it was read and checked before; None reads the file.

    Raises:
        CheckpointError: The tokenizer has more tokens than the model's vocab_size, or its file is missing or
            damaged.
        MissingDependencyError: The ``tokenizers`` library is needed and not installed.
    """
    if config.tokenizer == "none":
        return NoTokenizer()
    if config.tokenizer == TOKENIZER_FILE:
        return FileTokenizer(Path(folder) / TOKENIZER_FILE, config, content)
    if config.vocab_size < BYTE_VOCABULARY:
        raise CheckpointError(
            f"{folder}: the byte tokenizer has {BYTE_VOCABULARY} tokens, "
            f"more than the model's vocab_size {config.vocab_size}"
        )
    return ByteTokenizer(config)


def begun(ids: Sequence[int], bos: int | None) -> list[int]:
    """A sequence that begins with the begin-of-sequence token, once; as it is for a model without one."""
    if bos is None:
        return list(ids)
    return [bos, *itertools.dropwhile(lambda token: token == bos, ids)]


def _checked_utf8(text: str, parse_special: bool) -> bytes:
    """The UTF-8 form of a text to encode."""
    if not isinstance(text, str):
        raise InputError(f"expected text to encode, found {type(text).__name__}")
    if not isinstance(parse_special, bool):
        raise InputError(f"parse_special must be True or False, found {type(parse_special).__name__}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode: a lone surrogate {text[error.start]!r} at character "
            f"{error.start}; read it as UTF-8"
        ) from None


def _checked_ids(ids: Iterable[int]) -> list[int]:
    """Token ids as plain integers; whether the vocabulary has them does not matter here."""
    try:
        return [operator.index(token_id) for token_id in ids]
    except Exception as error:  # whatever an object of the caller's raises
        raise InputError(
            f"expected token ids such as [1, 2, 3], found {type(ids).__name__} ({type(error).__name__})"
        ) from error
