"""A ``tokenizer.json`` and the ``tokenizers`` library that reads it: one loader, one guard around every call.

What training left in the file and what makes ids of a text depend on anything but the text is switched off on loading:
padding, truncation, templates around the text, BPE dropout, sampling of Unigram.

The library is written in Rust. Where a file is damaged in a way it does not expect it panics, and Python sees a
``PanicException``, which is no ``Exception``. (Rust's panic hook also writes to the standard error output before
Python hears of it, which nothing here can keep it from; the one damage known to do so on loading is looked for first.)
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crt_export.errors import CheckpointError, CrtExportError, InputError, MissingDependencyError
from crt_export.exclusive import Exclusive
from crt_export.strict_json import json_problem, parse_unique_keys
from crt_export.user_files import read_input

_MOST_BYTES = 256 << 20
#: Settings of a model that draw random numbers while encoding.
_RANDOM_SETTINGS = ("dropout", "alpha", "nbest_size")


class TokenizerFile:
    """The library's tokenizer, every call of it guarded.

    Any method of the library's ``Tokenizer`` can be called; a failure or panic in it raises InputError.
    """

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        """Read the file, or its content where that was read before.

        Raises:
            MissingDependencyError: The ``tokenizers`` library is not installed.
            CheckpointError: The file is missing or damaged.
        """
        self.path = path
        content = _checked_content(path, content)
        with library_errors(CheckpointError, f"{path}: not a readable tokenizer.json"):
            self._library = without_training_settings(_tokenizer_class(path).from_buffer(content))
            added = self._library.get_added_tokens_decoder()
            vocabulary = self._library.get_vocab(with_added_tokens=True)
            self.special_tokens = {token.content: number for number, token in added.items() if token.special}
        #: Number of ids the tokenizer can produce: the largest and all below it.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._exclusive = Exclusive("this tokenizer")
        self._plain: Any = None

    def __getattr__(self, name: str) -> Any:
        """A method or property of the library's tokenizer."""
        value = getattr(self.__dict__["_library"], name)
        return self._guarded(name, value) if callable(value) else value

    def encode_ids(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of a text, nothing put before or behind.

        Args:
            text: Any text with a UTF-8 form.
            parse_special: Whether text that spells a special token becomes that token; else it becomes what text of
                these characters is to a model.

        Raises:
            InputError: The library cannot encode it.
        """
        library = self._library if parse_special else self._plain or self._exclusive.wait(self._text_only)
        encode = self._guarded("encode", library.encode)
        return list(encode(text, add_special_tokens=False).ids)

    def _guarded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **named: Any) -> Any:
            with library_errors(InputError, f"{self.path}: the tokenizers library failed to {name.replace('_', ' ')}"):
                return call(*arguments, **named)

        return guarded

    def _text_only(self) -> Any:
        """A second tokenizer without special tokens, made on first use.

        The library's switch is a property of the tokenizer, so it would hold for the calls of other threads too; and it
        leaves the model's own vocabulary alone, in which Unigram and WordLevel find the very same token.
        """
        if self._plain is None:  # another thread may have made it just now
            with library_errors(CheckpointError, f"{self.path}: special tokens cannot be told from text"):
                document = _without_special_tokens(json.loads(self._library.to_str()), self.special_tokens)
                plain = without_training_settings(_tokenizer_class(self.path).from_str(json.dumps(document)))
                plain.encode_special_tokens = True
            self._plain = plain
        return self._plain


@contextmanager
def library_errors(kind: type[CrtExportError], heading: str) -> Iterator[None]:
    """Make what the ``tokenizers`` library raises one of our errors: bare exceptions and panics.

    Args:
        kind: The error to raise.
        heading: What failed, with the file.
    """
    try:
        yield
    except (CrtExportError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise  # an interrupt
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise kind(f"{heading} ({words[0]:.300})") from None


def _is_panic(error: BaseException) -> bool:
    """Whether it is PyO3's exception for a Rust panic, whose class no module exports."""
    return type(error).__name__ == "PanicException"


def _tokenizer_class(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingDependencyError(
            f"{path}: reading a tokenizer.json needs the tokenizers library: pip install 'crt-export[text]'"
        ) from None
    return tokenizers.Tokenizer


def _checked_content(path: Path, content: bytes | None) -> bytes:
    """The bytes of the file, which are JSON without duplicate keys."""
    _tokenizer_class(path)  # what is missing comes before what is damaged
    try:
        if content is None:
            content = read_input(path, most=_MOST_BYTES)
        document = parse_unique_keys(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, although config.json says tokenizer = {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable tokenizer.json: it {json_problem(error)}") from None
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise CheckpointError(f"{path}: not a readable tokenizer.json: expected an object with a 'model' in it")
    _check_normalizers(path, document.get("normalizer"))
    return content


def _check_normalizers(path: Path, normalizer: object) -> None:
    """Refuse a table of SentencePiece ("Precompiled") on which the library would panic."""
    pending = [normalizer]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        if not isinstance(part, dict):
            continue
        pending.append(part.get("normalizers"))
        if part.get("type") == "Precompiled" and not _is_charsmap(part.get("precompiled_charsmap")):
            raise CheckpointError(
                f"{path}: not a readable tokenizer.json: the table of its normalizer (precompiled_charsmap) is damaged"
            )


def _is_charsmap(table: object) -> bool:
    """Whether it is base64 of: the size of a trie in bytes, uint32 little endian; the trie; the normalised texts."""
    try:
        content = base64.b64decode(table, validate=True) if isinstance(table, str) else b""
    except (binascii.Error, ValueError):
        return False
    size = int.from_bytes(content[:4], "little")
    return len(content) >= 4 + size and size % 4 == 0


def without_training_settings(library: Any) -> Any:
    """Switch off what changes or draws ids: a prompt is neither padded nor cut, and has one encoding."""
    from tokenizers.processors import TemplateProcessing

    library.no_padding()
    library.no_truncation()
    if library.post_processor is not None:  # the file's may repeat the text, or leave it out
        library.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    for name in _RANDOM_SETTINGS:
        if getattr(library.model, name, None) is not None:
            setattr(library.model, name, None)
    return library


def _without_special_tokens(document: dict[str, Any], special: dict[str, int]) -> dict[str, Any]:
    """The file with names for its special tokens that no text spells; ids stay."""
    nonce = secrets.token_hex(16)
    renamed = {name: f"{nonce} {number}" for name, number in special.items()}
    model = dict(document["model"])
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed.get(name, name): number for name, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[renamed.get(name, name), score] for name, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    if isinstance(model.get("merges"), list):
        model["merges"] = [merge for merge in model["merges"] if not renamed.keys() & _merge_tokens(merge)]
    added = [
        {**token, "content": renamed.get(token["content"], token["content"])} for token in document["added_tokens"]
    ]
    return {**document, "model": model, "added_tokens": added, "post_processor": None}


def _merge_tokens(merge: Any) -> set[str]:
    """What a merge of BPE joins and makes; it is written as a pair, or as one string with a space."""
    left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
    return {left, right, left + right}
