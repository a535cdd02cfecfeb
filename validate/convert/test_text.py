"""Tokenizer, begin and end of a sequence, chat template: what belongs to text is carried along, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.convert.folder import HuggingFaceFolder
from crt_export.convert.text import read_text
from crt_export.errors import CheckpointError, UnsupportedError
from crt_export.tokenizer import FileTokenizer

pytest.importorskip("tokenizers")
Tokenizer = Callable[..., None]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}))
    return tmp_path


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    """Write a tokenizer.json: special tokens, then letters; a template puts some of them before a text."""

    def write(*special: str, begins: tuple[int, ...] = (), beyond: dict[str, int] | None = None, **added: Any) -> None:
        vocabulary = {token: number for number, token in enumerate((*special, *_LETTERS))} | (beyond or {})
        document = {
            "version": "1.0",
            "added_tokens": [
                _added(number, token) for token, number in vocabulary.items() if token in special or token in added
            ],
            "pre_tokenizer": None,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None},
        }
        for token, number in added.items():
            document["added_tokens"].append(_added(number, f"<{token}>", special=token != "plain"))
        if begins:
            names = [special[number] for number in begins]
            first = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
            document["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {name: {"id": name, "ids": [vocabulary[name]], "tokens": [name]} for name in names},
            }
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return write


def _added(number: int, content: str, *, special: bool = True) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **plain}


def _text(folder: Path, vocab_size: int = 40) -> Any:
    return read_text(HuggingFaceFolder(folder), vocab_size)


def test_bos_is_kept_only_where_the_tokenizer_adds_it(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer("<pad>", "<s>", "</s>")
    assert _text(folder).keys["bos_token_id"] is None
    tokenizer("<pad>", "<s>", "</s>", begins=(1,))
    assert _text(folder).keys == {"tokenizer": "tokenizer.json", "bos_token_id": 1, "eos_token_id": 2}


def test_several_tokens_before_every_text_are_refused(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer("<pad>", "<s>", "</s>", begins=(1, 0))
    with pytest.raises(UnsupportedError, match="puts 2 tokens before every text"):
        _text(folder)


def test_without_tokenizer_there_are_ids_only(folder: Path) -> None:
    text = _text(folder)
    assert text.keys == {"tokenizer": "none", "bos_token_id": None, "eos_token_id": 2}
    assert "token ids only" in text.notes[0]


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_another_kind_of_tokenizer_comes_with_the_line_that_converts_it(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(UnsupportedError, match=rf"{name} and no tokenizer.json.*AutoTokenizer.from_pretrained"):
        _text(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model": {"type": "none"}}'])
def test_a_damaged_tokenizer(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        _text(folder)


def test_special_tokens_beyond_the_vocabulary_are_left_out(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer("<pad>", "<s>", "</s>", begins=(1,), image=29)
    text = _text(folder, 29)
    assert "<image>" in text.notes[0]
    (folder / "tokenizer.json").write_bytes(text.files["tokenizer.json"])

    class Config:
        vocab_size, bos_token_id, special_token_ids = 29, 1, frozenset((1, 2))

    library = FileTokenizer(folder / "tokenizer.json", Config())  # type: ignore[arg-type]
    assert max(library.encode("a<image>b"), default=0) < 29
    assert _text(folder, 29).files == text.files


@pytest.mark.parametrize("made", [{"beyond": {"zz": 29}}, {"plain": 29}])
def test_ids_beyond_the_vocabulary_that_text_can_produce_are_refused(
    folder: Path, tokenizer: Tokenizer, made: dict[str, Any]
) -> None:
    tokenizer("<pad>", "<s>", "</s>", **made)
    with pytest.raises(CheckpointError, match=r"text can produce 1 ids .* vocab_size being 29: .* = 29"):
        _text(folder, 29)
    assert not _text(folder, 30).notes


def test_a_vocabulary_larger_than_the_tokenizer_passes(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer("<pad>", "<s>", "</s>")
    assert not _text(folder, 5000).notes


def test_several_ends_come_from_the_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7, 5]}))
    text = _text(folder)
    assert text.keys["eos_token_id"] == (5, 7)
    assert json.loads(text.files["generation_config.json"])["eos_token_id"] == [5, 7, 5]


def test_ends_beyond_the_vocabulary_are_left_out(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [50256, 7]}))
    text = _text(folder)
    assert text.keys["eos_token_id"] == 7
    assert "[50256]" in " ".join(text.notes)


def test_ends_of_the_wrong_kind_are_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ["end"]}))
    with pytest.raises(CheckpointError, match="eos_token_id must be an integer or a list"):
        _text(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "of chat"),
        ("chat_template.json", json.dumps({"chat_template": "of chat"})),
        ("tokenizer_config.json", json.dumps({"chat_template": "of chat"})),
        (
            "tokenizer_config.json",
            json.dumps(
                {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": "of chat"}]}
            ),
        ),
    ],
)
def test_the_chat_template_travels_wherever_it_stands(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    assert _text(folder).files["chat_template.jinja"] == b"of chat"
