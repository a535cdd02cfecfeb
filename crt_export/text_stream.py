"""Streams of text from ids as they arrive, which give exactly what decoding all ids at once gives.

A stream gives a character out as soon as no later id can change it. Where that is decided differs:

* Bytes and byte-level vocabularies: when the character's last byte is there.
* Byte fallback (``<0xE2>`` tokens among others): the ``tokenizers`` library looks at a whole run of such tokens and
  makes every byte of it U+FFFD unless all of it is valid. A run that is valid so far is therefore given out when it
  ends, and one that cannot become valid any more at once.
* Everything else: at once.

A stream that goes on after other ids (a prompt, an earlier generation) gets those as its context. It reads no more
of them than it needs, and what they leave incomplete is completed by what follows.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

from crt_export.config import BYTE_VOCABULARY
from crt_export.errors import InputError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: In a context: the text before it was given out to its end, what it left incomplete as U+FFFD.
TEXT_END = -1
# A window is made shorter when it has more ids than this. Above 4, so that what is kept covers any UTF-8 character.
_WINDOW = 8
_LONGEST_CHARACTER = 4
# The decoders of the library whose text of a token depends on bytes around it.
_BYTE_LEVEL, _BYTE_FALLBACK = "ByteLevel", "ByteFallback"
# What the library reads as a byte, sign and all.
_FALLBACK_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class TextStream(Protocol):
    """Turns ids into text as they arrive, never splitting a UTF-8 character."""

    @property
    def rest(self) -> str:
        """What is held back, as text that ends here: U+FFFD for bytes that are no character."""
        ...

    def push(self, token_id: int) -> str:
        """Text that this id makes certain; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """The rest; nothing is held back any more."""
        ...


class ByteStream:
    """The text of one id per UTF-8 byte."""

    def __init__(self, silent: Collection[int], context: Sequence[int] = ()) -> None:
        """Begin after other ids.

        Args:
            silent: Ids that give no text and break no character; every other id outside 0 to 255 is U+FFFD.
            context: Ids in front, or TEXT_END.
        """
        self._silent = silent
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        last: list[int] = []
        for token_id in reversed(context):
            if token_id in silent:
                continue
            if not 0 <= token_id < BYTE_VOCABULARY or len(last) == _LONGEST_CHARACTER:
                break
            last.append(token_id)
        for token_id in reversed(last):
            self.push(token_id)

    @property
    def rest(self) -> str:
        """U+FFFD for an incomplete character, or nothing."""
        return self._decoder.getstate()[0].decode("utf-8", errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes."""
        if 0 <= token_id < BYTE_VOCABULARY:
            return self._decoder.decode(bytes((token_id,)))
        return "" if token_id in self._silent else self.finish() + REPLACEMENT

    def finish(self) -> str:
        """The rest; nothing is held back any more."""
        rest = self.rest
        self._decoder.reset()
        return rest


class LibraryText:
    """Ids to text by a tokenizer of the ``tokenizers`` library, all at once or as a stream."""

    def __init__(self, library: Any, silent: Collection[int | None]) -> None:
        """Take a tokenizer.

        Args:
            library: A ``tokenizers.Tokenizer``.
            silent: Ids that give no text, besides the library's special tokens; None stands for no id.
        """
        self._library = library
        added = library.get_added_tokens_decoder()
        self._hidden: set[int | None] = {*silent, *(token_id for token_id, token in added.items() if token.special)}
        kinds = set() if library.decoder is None else set(_kinds(json.loads(library.decoder.__getstate__())))
        self.byte_level = _BYTE_LEVEL in kinds
        self._byte_fallback = _BYTE_FALLBACK in kinds

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, all at once."""
        shown = [token_id for token_id in ids if token_id not in self._hidden]
        return self._library.decode(shown, skip_special_tokens=True)

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """A stream after other ids, or TEXT_END among them."""
        return _WindowStream(self, context)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry; None for an id that gives no text and does not part its neighbours."""
        return None if token_id in self._hidden else self._library.id_to_token(token_id)

    def byte_from_token(self, token: str) -> int | None:
        """The byte that a byte-fallback token stands for; None for every other token."""
        found = _FALLBACK_TOKEN.fullmatch(token) if self._byte_fallback else None
        return None if found is None else int(found[1], 16)

    def ends_within_character(self, ids: Sequence[int]) -> bool:
        """Whether the bytes of these ids, of a byte-level vocabulary, leave their last character incomplete."""
        tokens = [token for token_id in ids[-_LONGEST_CHARACTER:] if (token := self.token(token_id)) is not None]
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(b"".join(map(_bytes_from_token, tokens)))
        return bool(decoder.getstate()[0])


class _WindowStream:
    """Decodes a short window of ids again for each new one, because a token's text depends on its neighbours.

    The window begins with an id that has text of its own: decoders treat the beginning of a text in their own ways (a
    space is dropped, a prefix is kept), and what they do there must lie before all that is still to be given out.
    """

    def __init__(self, text: LibraryText, context: Sequence[int]) -> None:
        self._text = text
        self._window: list[int] = []
        # Characters of the window's text that were given out, or lie before it.
        self._given = 0
        self._run = _ByteRun()
        for token_id in context[self._beginning(context) :]:
            if token_id == TEXT_END:
                self.finish()
            else:
                self.push(token_id)

    @property
    def rest(self) -> str:
        return self._text.decode(self._window)[self._given :]

    def push(self, token_id: int) -> str:
        token = self._text.token(token_id)
        if token is None:
            return ""
        byte = self._text.byte_from_token(token)
        if byte is not None:
            return self._push_byte(token_id, byte)
        self._run = _ByteRun()
        self._window.append(token_id)
        return self._give()

    def finish(self) -> str:
        rest = self.rest
        self._given += len(rest)
        return rest

    def _push_byte(self, token_id: int, byte: int) -> str:
        if self._run.invalid:  # as every byte of it is U+FFFD, the window need not grow
            before = self._text.decode(self._window)
            return self._text.decode([*self._window, token_id])[len(before) :]
        self._window.append(token_id)
        self._run.push(byte)
        return self._give() if self._run.invalid else ""

    def _give(self) -> str:
        try:
            text = self._text.decode(self._window)
        except InputError:  # see _can_begin(); with the next token it may have a text, at the end it has to
            return ""
        open_ended = self._text.byte_level and self._text.ends_within_character(self._window)
        piece = text[self._given : len(text) - open_ended]
        self._given += len(piece)
        if len(self._window) > _WINDOW and not self._run.invalid:
            self._shorten(text)
        return piece

    def _shorten(self, text: str) -> None:
        """Drop ids in front, so that the cost of an id does not grow with the text."""
        held = len(text) - self._given
        for begin in range(len(self._window) - _LONGEST_CHARACTER, 0, -1):
            if self._can_begin(self._window[begin]):
                self._window = self._window[begin:]
                self._given = len(self._text.decode(self._window)) - held
                return
        # Ids without text, one after the other: the last one stands for all.
        shorter = [*self._window[:-2], self._window[-1]]
        if self._text.decode(shorter) == text:
            self._window = shorter

    def _beginning(self, context: Sequence[int]) -> int:
        """Where in a context a window has to begin."""
        shown = 0
        for index in range(len(context) - 1, -1, -1):
            shown += context[index] != TEXT_END and self._text.token(context[index]) is not None
            if shown >= _LONGEST_CHARACTER and self._can_begin(context[index]):
                return index
        return 0

    def _can_begin(self, token_id: int) -> bool:
        """Whether a window may begin with this id: it has text, and is not one of a run of bytes."""
        token = None if token_id == TEXT_END else self._text.token(token_id)
        if token is None or self._text.byte_from_token(token) is not None:
            return False
        try:
            return self._text.decode([token_id]) != ""
        except InputError:  # the library cannot strip both ends of a text of one space, and may never have to
            return False


class _ByteRun:
    """Byte-fallback tokens in a row: whether they can still become valid UTF-8."""

    def __init__(self) -> None:
        self.invalid = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")

    def push(self, byte: int) -> None:
        try:
            self._decoder.decode(bytes((byte,)))
        except UnicodeDecodeError:
            self.invalid = True


def _kinds(decoder: dict[str, Any]) -> list[str]:
    """Names of a decoder and of all that it consists of."""
    return [decoder["type"], *(kind for part in decoder.get("decoders", ()) for kind in _kinds(part))]


def _byte_letters() -> dict[str, int]:
    """What a byte-level vocabulary writes bytes with: printable Latin-1 as itself, the others from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(BYTE_VOCABULARY) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_FROM_LETTER = _byte_letters()


def _bytes_from_token(token: str) -> bytes:
    """Bytes of a byte-level token; an added token with other letters is its own text."""
    try:
        return bytes(_BYTE_FROM_LETTER[letter] for letter in token)
    except KeyError:
        return token.encode()
