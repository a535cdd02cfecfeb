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


def test_a_character_in_front_of_an_incomplete_one_is_searched_at_once(file_tokenizer: Tokenizer) -> None:
    # " Ã" is a space and the first byte of a character.
    text = RowText(file_tokenizer, (" ",))
    ids = file_tokenizer.encode("x é")[:2]
    assert [text.push(token) for token in ids] == ["x", ""]
    assert (text.text, text.stop_string, text.rest, text.finish()) == ("x", " ", "", "")


def test_a_stop_string_in_the_rest_still_ends_the_text(tokenizer: Tokenizer) -> None:
    text = RowText(tokenizer, ("\ufffd",))
    assert [text.push(token) for token in [*tokenizer.encode("x"), tokenizer.encode("é")[0]]] == ["x", ""]
    assert (text.stop_string, text.rest) == (None, "")
    assert (text.finish(), text.text, text.stop_string) == ("", "x", "\ufffd")


def test_the_rest_is_what_finish_gives_and_stays_until_then(tokenizer: Tokenizer) -> None:
    text = RowText(tokenizer, ("\nUser:",))
    for token in [*tokenizer.encode("ok\nUse"), tokenizer.encode("é")[0]]:
        text.push(token)
    assert (text.rest, text.held, text.text) == ("\nUse\ufffd", 4, "ok")
    assert text.push(tokenizer.encode("é")[-1]) == "\nUseé"
    assert (text.rest, text.held) == ("", 0)


@pytest.mark.parametrize("stops", [(), ("END",), ("\N{GRINNING FACE}!", "é?"), ("lo \nwor", "d")])
def test_a_text_that_goes_on_anywhere_is_the_unbroken_one(tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
    prompt, ids = tokenizer.encode("é"), tokenizer.encode("hello \nworEN é END\N{GRINNING FACE}!")
    unbroken = RowText(tokenizer, stops)
    unbroken.go_on(prompt, 0)
    pieces = [unbroken.push(token) for token in ids]
    for cut in range(len(ids) + 1):
        first, second = RowText(tokenizer, stops), RowText(tokenizer, stops)
        first.go_on(prompt, 0)
        given = [first.push(token) for token in ids[:cut]]
        if first.stop_string is None:
            second.go_on([*prompt, *ids[:cut]], first.held)
            assert first.rest == second.rest
            given += [second.push(token) for token in ids[cut:]]
            assert (second.stop_string, second.rest) == (unbroken.stop_string, unbroken.rest)
            assert given == pieces
        assert first.text + second.text == unbroken.text


def test_without_a_tokenizer_there_is_no_text() -> None:
    text = RowText(None, ())
    text.go_on([1, 2], 0)
    assert (text.push(65), text.rest, text.finish(), text.text, text.stop_string) == ("", "", "", "", None)
