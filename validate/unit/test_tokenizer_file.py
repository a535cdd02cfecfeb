"""What training left in tokenizer.json is off, what the library throws is an error of ours, text may be text only."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from crt_export.config import ModelConfig
from crt_export.errors import CheckpointError, CrtExportError, InputError
from crt_export.tokenizer import Tokenizer as AnyTokenizer
from crt_export.tokenizer import load_tokenizer
from crt_export.tokenizer_file import TokenizerFile, library_errors, without_training_settings

ConfigMaker = Callable[..., ModelConfig]
Loader = Callable[..., AnyTokenizer]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ("<s>", "</s>", "<|eot|>")


@pytest.fixture
def load(tiny_config: ConfigMaker, tmp_path: Path) -> Loader:
    """``load(library, **config)``: the library's tokenizer, or the text of one, saved and read as a checkpoint's."""

    def loaded(library: Any, **changes: Any) -> AnyTokenizer:
        text = library if isinstance(library, str) else library.to_str()
        (tmp_path / "tokenizer.json").write_text(text)
        return load_tokenizer(tmp_path, tiny_config(tokenizer="tokenizer.json", vocab_size=300, **changes))

    return loaded


def byte_level() -> Any:
    library: Any = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(LETTERS)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return library


def unigram() -> Any:
    """As of T5: the end token is a piece of the model itself, and the best one."""
    pieces = ["<unk>", "</s>", "<s>", "<|eot|>", "▁", *"abe<|>/ost"]
    library: Any = Tokenizer(
        models.Unigram([(piece, 0.0 if index < 4 else -2.0) for index, piece in enumerate(pieces)], 0)
    )
    library.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return library


def word_level() -> Any:
    words = ["<unk>", *SPECIAL, "a", "b"]
    library: Any = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return library


FAMILIES = {"byte level": byte_level, "unigram": unigram, "word level": word_level}


# --- What training left in the file --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_truncation_of_the_file_are_off(family: str, load: Loader) -> None:
    plain, trained = FAMILIES[family](), FAMILIES[family]()
    expected = load(plain).encode("a b a b a b")
    trained.enable_padding(length=64, pad_id=0, pad_token="<unk>", direction="left")
    trained.enable_truncation(max_length=3, direction="left", stride=1)
    tokenizer = load(trained)
    for parse_special in (True, False):
        assert tokenizer.encode("a b a b a b", parse_special=parse_special) == expected
    assert len(expected) > 3


def test_dropout_of_the_file_is_off(load: Loader) -> None:
    library = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "abab": 3}, [("a", "b"), ("ab", "ab")], dropout=0.5))
    tokenizer = load(library)
    for parse_special in (True, False):
        found = {tuple(tokenizer.encode("abababab", parse_special=parse_special)) for _ in range(50)}
        assert found == {(3, 3)}


def test_sampling_of_unigram_is_off() -> None:
    """The library does not read it from a file yet; what it would read is switched off."""
    pieces = [("<unk>", 0.0), ("a", -1.0), ("aa", -1.5), ("aaa", -1.9)]
    library: Any = Tokenizer(models.Unigram(pieces, 0, alpha=0.2))
    assert len({tuple(library.encode("aaaaaa").ids) for _ in range(50)}) > 1
    library = without_training_settings(library)
    assert len({tuple(library.encode("aaaaaa").ids) for _ in range(50)}) == 1


@pytest.mark.parametrize("single", ["$A $A", "</s>", "$A </s>"])
@pytest.mark.parametrize("parse_special", [True, False])
def test_a_template_of_the_file_neither_repeats_nor_drops_text(single: str, parse_special: bool, load: Loader) -> None:
    library = byte_level()
    plain = load(library).encode("ab")
    end = library.token_to_id("</s>")
    library.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", end)])
    assert load(library).encode("ab", parse_special=parse_special) == plain


# --- Begin of sequence: once ----------------------------------------------------------------------------------------


def test_the_begin_token_comes_once_whoever_else_adds_it(load: Loader) -> None:
    adding = byte_level()
    bos = adding.token_to_id("<s>")
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", bos + 1)])
    adding.post_processor = template
    prepending = byte_level()
    prepending.normalizer = normalizers.Prepend("<s>")
    for library in (byte_level(), adding, prepending):
        tokenizer = load(library, bos_token_id=bos)
        text = tokenizer.encode("ab")
        for prompt in ("ab", "<s>ab", "<s><s>ab"):
            ids = tokenizer.encode_prompt(prompt)
            assert (ids[0], ids.count(bos)) == (bos, 1), prompt
            assert ids[1:] == [token for token in text if token != bos]


def test_without_a_begin_token_nothing_is_added_or_taken(load: Loader) -> None:
    tokenizer = load(byte_level())
    bos = tokenizer.special_token_id("<s>")
    assert tokenizer.encode_prompt("<s><s>a") == [bos, bos, *tokenizer.encode("a")]
    assert tokenizer.encode_prompt("a") == tokenizer.encode("a")


# --- Special tokens in text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_spells_a_special_token_is_text_where_asked(family: str, load: Loader) -> None:
    tokenizer = load(FAMILIES[family](), bos_token_id=2)
    special = {tokenizer.special_token_id(text) for text in SPECIAL}
    assert None not in special
    for text in ("a </s> b", "</s>", "<|eot|>", "<s>a"):
        parsed, plain = (tokenizer.encode(text, parse_special=choice) for choice in (True, False))
        assert special & {*parsed}
        assert not special & {*plain}, "text became a special token"
        assert plain, "the text is lost"
    assert tokenizer.encode("ab a", parse_special=False) == tokenizer.encode("ab a")
    assert tokenizer.encode_prompt("</s>", parse_special=False)[0] == 2


def test_byte_level_text_of_a_special_token_comes_back_as_it_was(load: Loader) -> None:
    tokenizer = load(byte_level())
    assert tokenizer.decode(tokenizer.encode("a<|eot|>b", parse_special=False)) == "a<|eot|>b"


def test_threads_do_not_see_each_others_choice(load: Loader) -> None:
    tokenizer = load(byte_level())
    expected = {choice: tokenizer.encode("a<|eot|>b", parse_special=choice) for choice in (True, False)}
    tokenizer = load(byte_level())  # so that the threads race for the second tokenizer too
    wrong: list[Any] = []

    def work(choice: bool) -> None:
        for _ in range(200):
            if (found := tokenizer.encode("a<|eot|>b", parse_special=choice)) != expected[choice]:
                wrong.append((choice, found))

    threads = [threading.Thread(target=work, args=(index % 2 == 0,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert expected[True] != expected[False]


def test_an_end_token_is_silent_where_it_is_special_and_text_where_it_is_text(load: Loader) -> None:
    library = byte_level()
    newline, end = library.encode("\n").ids[0], library.token_to_id("</s>")
    tokenizer = load(library, eos_token_id=[newline, end])
    assert tokenizer.decode([*tokenizer.encode("a"), newline, end, *tokenizer.encode("b")]) == "a\nb"


# --- What the library throws -----------------------------------------------------------------------------------------


def _damaged(edit: Callable[[dict[str, Any]], object]) -> str:
    document = json.loads(byte_level().to_str())
    edit(document)
    return json.dumps(document)


def _charsmap(table: object) -> Callable[[dict[str, Any]], object]:
    precompiled = {"type": "Precompiled", "precompiled_charsmap": table}
    return lambda document: document.update(normalizer={"type": "Sequence", "normalizers": [precompiled]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"model": 1}',
        "[" * 100_000,
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        byte_level().to_str().replace('"version"', '"version": "1.0", "version"'),
        byte_level().to_str().replace('"vocab":{', '"vocab":{"a": 7,', 1),
        byte_level().to_str()[:-40],
        _damaged(lambda document: document["model"].update(type="GPT-9")),
        _damaged(lambda document: document["model"].update(merges=[["zz", "yy"]])),
        _damaged(lambda document: document["model"].update(vocab={"a": -1})),
        _damaged(lambda document: document["model"].update(vocab={"a": float("nan")})),
        _damaged(lambda document: document.pop("model")),
        _damaged(_charsmap("AAAA")),
        _damaged(_charsmap("")),
        _damaged(_charsmap("!!")),
        _damaged(_charsmap("/////wAA")),
        _damaged(_charsmap([])),
        _damaged(lambda document: document.update(normalizer={"type": "Precompiled"})),
    ],
    ids=range(21),
)
def test_a_damaged_file_is_one_clear_error_without_a_panic(text: str, load: Loader, capfd: Any) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer\.json"):
        load(text)
    assert "panicked" not in capfd.readouterr().err


def test_panics_and_bare_exceptions_are_errors_and_interrupts_pass() -> None:
    class PanicException(BaseException):
        """As PyO3's, which no module exports."""

    for error in (PanicException("index out of bounds\nbacktrace"), Exception("anything"), TypeError("wrong")):
        with pytest.raises(InputError, match=r"^it failed \(") as caught, library_errors(InputError, "it failed"):
            raise error
        assert "backtrace" not in str(caught.value)
    for interrupt in (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        with pytest.raises(interrupt), library_errors(InputError, "it failed"):
            raise interrupt
    with pytest.raises(CheckpointError, match=r"^ours$"), library_errors(InputError, "it failed"):
        raise CheckpointError("ours")


def test_a_real_panic_over_a_text_is_an_input_error(load: Loader) -> None:
    trie = b"\xff" * 4  # well formed, and its only unit points far beyond its end
    table = base64.b64encode(len(trie).to_bytes(4, "little") + trie).decode()
    tokenizer = load(_damaged(_charsmap(table)))
    for call in (tokenizer.encode, tokenizer.encode_prompt):
        with pytest.raises(
            InputError, match=r"tokenizer\.json: the tokenizers library failed to encode \(index out of"
        ):
            call("hello")
        with pytest.raises(InputError, match="failed to encode"):
            call("hello", parse_special=False)


def test_every_call_of_the_library_is_guarded(load: Loader, tmp_path: Path) -> None:
    load(byte_level())
    guarded = TokenizerFile(tmp_path / "tokenizer.json")
    calls: list[Callable[[], Any]] = [
        lambda: guarded.decode([-1]),
        lambda: guarded.decode(["a"]),
        lambda: guarded.encode(3),
        lambda: guarded.token_to_id(None),
        lambda: guarded.get_vocab(with_added_tokens="perhaps", more=1),
    ]
    for call in calls:
        with pytest.raises(CrtExportError, match=r"tokenizer\.json: the tokenizers library failed to "):
            call()
    assert guarded.id_to_token(0) == LETTERS[0]
