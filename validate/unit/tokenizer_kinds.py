"""Tokenizers of every decoder kind, small enough to see through: built here, never downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ["<s>", "</s>", "<|tool|>"]
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "▁a", "b", "▁world", "!", "世", "é", "a▁b", "\ufffd", "▁."]


def byte_level() -> Tokenizer:
    """Byte-level BPE with tokens that hold the end of one character and the beginning of the next."""
    letters = _letters()
    crossing = [b"\xec\x84", b"\xb8\xec\x84", b"\x96\xe4\xb8", b"\x9f\x98", b"\x80a\xf0", b" \xc3", b"he", b" world"]
    vocab = {letter: byte for byte, letter in letters.items()}
    for token in crossing:
        vocab["".join(letters[byte] for byte in token)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return _with_special(tokenizer, AddedToken("世界", special=False))


def llama() -> Tokenizer:
    """Spaces as ▁, bytes where the vocabulary ends, the first space of a text dropped."""
    vocab = {token: index for index, token in enumerate(["<unk>", *SPECIAL[:2], *FALLBACK, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_special(tokenizer)


def metaspace_bytes() -> Tokenizer:
    """Unigram with byte fallback in front of the Metaspace decoder."""
    tokenizer = _unigram([*FALLBACK, *WORDS], byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])  # type: ignore[assignment]
    return _with_special(tokenizer)


def unigram() -> Tokenizer:
    """Unigram with the Metaspace decoder alone."""
    tokenizer = _unigram(WORDS, byte_fallback=False)
    tokenizer.decoder = decoders.Metaspace()  # type: ignore[assignment]
    return _with_special(tokenizer)


def word_piece() -> Tokenizer:
    """Words joined by spaces, pieces with ## and marks joined without."""
    words = ["[UNK]", "a", "fine", "##r", "##", "day", ".", "'", "n't", "##世", "!"]
    tokenizer = Tokenizer(models.WordPiece(vocab={word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    return _with_special(tokenizer)


def word_ends() -> Tokenizer:
    """A vocabulary that marks where words end; the last word's mark gives no space."""
    vocab = {word: index for index, word in enumerate(["a</w>", "b", "fine</w>", "r</w>", "</w>", "世</w>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder()  # type: ignore[assignment]
    return _with_special(tokenizer)


def words_only() -> Tokenizer:
    """No decoder at all: the library puts a space between tokens."""
    return _with_special(Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1, "世": 2, "": 3}, unk_token="a")))


def nothing() -> Tokenizer:
    """A decoder that makes nothing of one of the tokens, and drops the first space of a text."""
    tokenizer = Tokenizer(models.WordLevel(vocab={"a": 0, "#": 1, "▁b": 2}, unk_token="a"))
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("#", ""), decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_special(tokenizer)


def both_ends() -> Tokenizer:
    """Spaces as ▁; one space is dropped at the beginning of a text and one at its end."""
    tokenizer = Tokenizer(models.WordLevel(vocab={"a": 0, "▁": 1}, unk_token="a"))
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 1)]
    )
    return _with_special(tokenizer)


_MAKERS = (byte_level, llama, metaspace_bytes, unigram, word_piece, word_ends, words_only, nothing, both_ends)
KINDS: dict[str, Callable[[], Tokenizer]] = {make.__name__: make for make in _MAKERS}


def write_tokenizer(folder: Path, kind: str) -> Tokenizer:
    """Write ``tokenizer.json`` of a kind, and give the library's own tokenizer."""
    tokenizer = KINDS[kind]()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def _unigram(tokens: list[str], **options: Any) -> Tokenizer:
    scores = [("<unk>", 0.0), *((token, -float(index)) for index, token in enumerate(tokens))]
    return Tokenizer(models.Unigram(scores, unk_id=0, **options))


def _with_special(tokenizer: Tokenizer, *added: AddedToken) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens(list(added))
    return tokenizer


def _letters() -> dict[int, str]:
    """Letter of every byte, as GPT-2 chose them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters
