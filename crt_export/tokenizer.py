"""Text to token ids and back: bytes, a ``tokenizer.json``, or none at all.

Imports neither torch nor a runtime; the ``tokenizers`` library is imported only for a ``tokenizer.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from crt_export.config import BYTE_VOCABULARY, ModelConfig
from crt_export.errors import CheckpointError, InputError, MissingDependencyError
from crt_export.text_stream import ByteStream, LibraryText, TextStream

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

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without begin-of-sequence token."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: ``bos_token_id`` (if the model has one), then the text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; begin- and end-of-sequence tokens give none."""
        ...

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """An incremental decoder of what follows other ids: decode(context + ids) less the text of the context."""
        ...


class ByteTokenizer:
    """One id per UTF-8 byte (0..255); ids from 256 on belong to the model's special tokens."""

    name = "byte"
    vocab_size = BYTE_VOCABULARY

    def __init__(self, config: ModelConfig) -> None:
        """Take the special tokens from the configuration."""
        self._prefix = _prompt_prefix(config)
        # Only ids outside the byte range are silent: a model may use byte 0 to end a sequence and print it
        # too.
        special = {config.bos_token_id, config.eos_token_id} - {None}
        self._silent = frozenset(token for token in special if token is not None and token >= BYTE_VOCABULARY)

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of the text.

        Raises:
            InputError: The text holds lone surrogates, which have no UTF-8 form.
        """
        return list(_utf8_from_text(text))

    def encode_prompt(self, text: str) -> list[int]:
        """Begin-of-sequence id, if the model has one, then the bytes."""
        return [*self._prefix, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes; what is not valid UTF-8 becomes U+FFFD."""
        stream = self.stream()
        return "".join([*(stream.push(token_id) for token_id in ids), stream.finish()])

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """An incremental UTF-8 decoder of what follows other ids."""
        return ByteStream(self._silent, context)


class FileTokenizer:
    """A ``tokenizer.json`` read by the ``tokenizers`` library."""

    name = TOKENIZER_FILE

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """Read the file.

        Raises:
            MissingDependencyError: The ``tokenizers`` library is not installed.
            CheckpointError: The file is missing or damaged, or has ids the model has no embedding for.
        """
        self._library: Any = _load_tokenizer_file(path)
        self._prefix = _prompt_prefix(config)
        self._text = LibraryText(self._library, (config.bos_token_id, config.eos_token_id))
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{path}: has {self.vocab_size} tokens, more than the model's vocab_size "
                f"{config.vocab_size}; use the tokenizer the model was trained with"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens.

        Raises:
            InputError: The text holds lone surrogates, which have no UTF-8 form.
        """
        _utf8_from_text(text)
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Begin-of-sequence id, if the model has one, then the text's ids."""
        return [*self._prefix, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without special tokens."""
        return self._text.decode(ids)

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """An incremental decoder of what follows other ids."""
        return self._text.stream(context)


class NoTokenizer:
    """A model that speaks token ids only: every text is refused."""

    name = "none"
    vocab_size = 0

    def encode(self, text: str) -> list[int]:
        """Refuse.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "this model has no tokenizer (config.json: tokenizer = none); give token ids, for example --tokens FILE.npy"
        )

    def encode_prompt(self, text: str) -> list[int]:
        """Refuse, as encode() does."""
        return self.encode(text)

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


def load_tokenizer(folder: str | Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer that ``config.tokenizer`` names.

    Args:
        folder: Checkpoint or bundle folder; holds ``tokenizer.json`` if the configuration names it.
        config: The model's configuration.

    Raises:
        CheckpointError: The tokenizer has more tokens than the model's vocab_size, or its file is missing or
            damaged.
        MissingDependencyError: The ``tokenizers`` library is needed and not installed.
    """
    if config.tokenizer == "none":
        return NoTokenizer()
    if config.tokenizer == TOKENIZER_FILE:
        return FileTokenizer(Path(folder) / TOKENIZER_FILE, config)
    if config.vocab_size < BYTE_VOCABULARY:
        raise CheckpointError(
            f"{folder}: the byte tokenizer has {BYTE_VOCABULARY} tokens, "
            f"more than the model's vocab_size {config.vocab_size}"
        )
    return ByteTokenizer(config)


def _prompt_prefix(config: ModelConfig) -> Sequence[int]:
    return () if config.bos_token_id is None else (config.bos_token_id,)


def _utf8_from_text(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode: a lone surrogate {text[error.start]!r} at character "
            f"{error.start}; read it as UTF-8"
        ) from None


def _load_tokenizer_file(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingDependencyError(
            f"{path}: reading a tokenizer.json needs the tokenizers library: pip install 'crt-export[text]'"
        ) from None
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, although config.json says tokenizer = {TOKENIZER_FILE}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise CheckpointError(f"{path}: not a readable tokenizer.json ({error})") from error
