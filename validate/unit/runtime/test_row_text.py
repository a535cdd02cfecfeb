"""The text of a row: whole characters, searched for stop strings, nothing lost at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from crt_export.config import ModelConfig
from crt_export.runtime.row_text import RowText
from crt_export.tokenizer import Tokenizer, load_tokenizer

ConfigMaker = Callable[..., ModelConfig]


@pytest.fixture
def byte_tokenizer(tiny_config: ConfigMaker) -> Tokenizer:
    return load_tokenizer("unused", tiny_config())


@pytest.fixture
def file_tokenizer(tiny_config: ConfigMaker, tmp_path: Path) -> Tokenizer:
    """Byte-level, with a token that holds more than one character and one that ends within a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("Ġ", "Ã")]
    tokens = [*alphabet, *(a + b for a, b in merges)]
    library = Library(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    library.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path, tiny_config(tokenizer="tokenizer.json", vocab_size=len(tokens)))


@pytest.fixture(params=["byte", "file"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(f"{request.param}_tokenizer")


def pieces(text: RowText, ids: list[int]) -> list[str]:
    return [*(text.push(token) for token in ids), text.finish()]


def test_a_stop_string_is_found_across_tokens_and_within_them(tokenizer: Tokenizer) -> None:
    text = RowText(tokenizer, ("llo w",))
    given = pieces(text, tokenizer.encode("hello world"))
    assert "".join(given) == text.text == "he"
    assert text.stop_string == "llo w"


def test_characters_of_several_bytes_are_compared_whole(tokenizer: Tokenizer) -> None:
    # The first byte of é and of è is the same, and " é" arrives in tokens cut within the character.
    text = RowText(tokenizer, ("\N{GRINNING FACE}!", " é."))
    ids = tokenizer.encode("a é, è \N{GRINNING FACE}? é.b")
    given = pieces(text, ids)
    assert "".join(given) == text.text == "a é, è \N{GRINNING FACE}?"
    assert text.stop_string == " é."
    assert not any("\ufffd" in piece for piece in given)


def test_what_is_held_back_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    text = RowText(tokenizer, ("\nUser:",))
    ids = [*tokenizer.encode("ok\nUse"), tokenizer.encode("é")[0]]
    *during, last = pieces(text, ids)
    assert "".join(during) == "ok"
    assert last == "\nUse\ufffd"
    assert (text.text, text.stop_string) == ("ok\nUse\ufffd", None)
    assert text.finish() == ""


def test_a_stop_string_in_the_rest_still_ends_the_text(file_tokenizer: Tokenizer) -> None:
    # " Ã" is a space and the first byte of a character: the decoder holds the space back with it.
    text = RowText(file_tokenizer, (" ",))
    ids = file_tokenizer.encode("x é")[:2]
    assert [text.push(token) for token in ids] == ["x", ""]
    assert text.stop_string is None
    assert (text.finish(), text.text, text.stop_string) == ("", "x", " ")


def test_without_a_tokenizer_there_is_no_text() -> None:
    text = RowText(None, ())
    assert (text.push(65), text.finish(), text.text, text.stop_string) == ("", "", "", None)
