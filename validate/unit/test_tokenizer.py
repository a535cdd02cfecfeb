"""Text goes in and comes out whole."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from crt_export.config import ModelConfig
from crt_export.errors import CheckpointError, InputError, MissingDependencyError
from crt_export.tokenizer import load_tokenizer

TEXT = "Grüße, 世界! 👩‍🚀 e\N{COMBINING ACUTE ACCENT}\n"
ConfigMaker = Callable[..., ModelConfig]


def streamed(tokenizer: Any, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.finish()]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, derandomize=True)
def test_bytes_there_and_back(tiny_config: ConfigMaker, text: str) -> None:
    tokenizer = load_tokenizer("unused", tiny_config())
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text


def test_bytes_stream_whole_characters(tiny_config: ConfigMaker) -> None:
    tokenizer = load_tokenizer("unused", tiny_config())
    assert streamed(tokenizer, tokenizer.encode("aß世")) == ["a", "", "ß", "", "", "世", ""]


def test_bytes_that_are_no_character_become_one_replacement(tiny_config: ConfigMaker) -> None:
    tokenizer = load_tokenizer("unused", tiny_config())
    assert streamed(tokenizer, [0xC3]) == ["", "\ufffd"]
    assert streamed(tokenizer, [0xFF, 0x41]) == ["\ufffd", "A", ""]
    assert tokenizer.decode([0xC3, 0x41]) == "\ufffdA"


def test_special_tokens_of_a_byte_model(tiny_config: ConfigMaker) -> None:
    tokenizer = load_tokenizer("unused", tiny_config(vocab_size=260, bos_token_id=256, eos_token_id=257))
    assert tokenizer.encode("a") == [97]
    assert tokenizer.encode_prompt("a") == [256, 97]
    assert tokenizer.decode([256, 97, 257]) == "a"
    assert tokenizer.decode([97, 259, 98]) == "a\ufffdb"


@pytest.mark.parametrize("kind", ["byte", "tokenizer.json"])
def test_lone_surrogates_are_refused(kind: str, tiny_config: ConfigMaker, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, tiny_config(tokenizer=kind, vocab_size=300))
    with pytest.raises(InputError, match=r"lone surrogate '\\udcff' at character 2"):
        tokenizer.encode("ab\udcff")


def test_a_model_without_tokenizer_asks_for_ids(tiny_config: ConfigMaker) -> None:
    tokenizer = load_tokenizer("unused", tiny_config(tokenizer="none"))
    for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.encode_prompt("a")):
        with pytest.raises(InputError, match="give token ids"):
            call()
    for call in (lambda: tokenizer.decode([1]), tokenizer.stream):
        with pytest.raises(InputError, match="no tokenizer"):
            call()


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer with every byte and a few merges; returns its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "he", "ll", "hell", "Ġhell"])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "hell")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(vocabulary)


def test_a_tokenizer_file_there_and_back(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path)
    config = tiny_config(tokenizer="tokenizer.json", vocab_size=size)
    tokenizer = load_tokenizer(tmp_path, config)
    ids = tokenizer.encode("hell hell " + TEXT)
    assert len(ids) < len(("hell hell " + TEXT).encode())
    assert tokenizer.vocab_size == size
    assert tokenizer.decode(ids) == "hell hell " + TEXT


def test_a_tokenizer_file_streams_whole_characters(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, tiny_config(tokenizer="tokenizer.json", vocab_size=size))
    pieces = streamed(tokenizer, tokenizer.encode(TEXT * 3))
    assert "".join(pieces) == TEXT * 3
    assert not any("\ufffd" in piece for piece in pieces)
    assert streamed(tokenizer, tokenizer.encode("世")[:2])[-1] == "\ufffd"


def test_words_joined_by_the_decoder_keep_their_spaces(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    words = {"[UNK]": 0, "a": 1, "fine": 2, "##r": 3, "day": 4}
    library = Tokenizer(models.WordPiece(vocab=words, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    library.decoder = decoders.WordPiece()  # type: ignore[assignment]
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, tiny_config(tokenizer="tokenizer.json"))
    ids = tokenizer.encode("a finer day a day")
    assert streamed(tokenizer, ids)[:-1] == ["a", " fine", "r", " day", " a", " day"]


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=f"{size} tokens, more than the model's vocab_size {size - 1}"):
        load_tokenizer(tmp_path, tiny_config(tokenizer="tokenizer.json", vocab_size=size - 1))


def test_an_id_beyond_the_vocabulary_counts_even_where_there_are_gaps(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    library = Tokenizer(models.WordLevel(vocab={"a": 0, "z": 999}, unk_token="a"))
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="more than the model's vocab_size 300"):
        load_tokenizer(tmp_path, tiny_config(tokenizer="tokenizer.json", vocab_size=300))


def test_a_missing_or_damaged_tokenizer_file_is_named(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    config = tiny_config(tokenizer="tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        load_tokenizer(tmp_path, config)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        load_tokenizer(tmp_path, config)


def test_the_missing_library_names_the_extra(
    tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without_tokenizers(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(MissingDependencyError, match=r"crt-export\[text\]"):
        load_tokenizer(tmp_path, tiny_config(tokenizer="tokenizer.json"))
