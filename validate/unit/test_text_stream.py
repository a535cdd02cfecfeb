"""Streamed text is what decoding all ids at once gives, for every decoder kind and wherever it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crt_export.config import ModelConfig
from crt_export.errors import InputError
from crt_export.text_stream import TEXT_END
from crt_export.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

KINDS = ["byte", "byte_level", "llama", "metaspace_bytes", "unigram", "word_piece", "word_ends", "words_only"]
VOCABULARY = 400  # of the model; ids beyond the tokenizer's own have no text
REPLACEMENT = "\ufffd"
# Bytes of text that random ids rarely form, and of text that they damage.
SAMPLE = "aé世😀섖. \ufffd".encode()


class Kind:
    """A tokenizer of the package, the library's own decode, and ids worth trying.

    Attributes:
        tokenizer: What load_tokenizer() gives.
        decode: The reference: the library's decode, or Python's for bytes.
        ids: Ids that say much; text of several bytes stands in them in order.
    """

    def __init__(self, name: str, folder: Path, tiny_config: Callable[..., ModelConfig], kinds: ModuleType) -> None:
        self.name = name
        if name == "byte":
            config = tiny_config(vocab_size=VOCABULARY, bos_token_id=256, eos_token_id=257)
            self.tokenizer: Tokenizer = ByteTokenizer(config)
            self.decode: Callable[[list[int]], str] = decoded_bytes
            self.ids = [*SAMPLE, 0xFF, 0x80, 256, 257, 300]
            return
        library = kinds.write_tokenizer(folder, name)
        config = tiny_config(
            tokenizer="tokenizer.json", vocab_size=VOCABULARY, eos_token_id=library.token_to_id("</s>")
        )
        self.tokenizer = load_tokenizer(folder, config)
        self.decode = lambda ids: library.decode(ids, skip_special_tokens=True)
        size = library.get_vocab_size()
        first = library.token_to_id("<0x00>")
        runs = [*SAMPLE] if name == "byte_level" else [] if first is None else [first + byte for byte in SAMPLE]
        others = [*range(size)] if first is None else [0, 1, 2, *range(first + 256, size)]
        self.ids = [*runs, *others[-24:], size, VOCABULARY - 1]

    def continuations(self) -> list[list[int]]:
        """What may follow: every id worth trying, and bytes that complete what any of them leaves incomplete."""
        place = {"byte": 0, "byte_level": 0, "llama": 3, "metaspace_bytes": 1}.get(self.name)
        if place is None:
            return [[token] for token in self.ids]
        bytes_ = [[first, *[0x80] * more] for first in (0x80, 0x90, 0xA0) for more in range(3)]
        return [[token] for token in self.ids] + [[place + byte for byte in run] for run in bytes_]


def decoded_bytes(ids: list[int]) -> str:
    """Ids from 256 on part the text, but for the silent ones; each is U+FFFD."""
    parts, run = [], bytearray()
    for token in ids:
        if token < 256:
            run.append(token)
        elif token not in (256, 257):
            parts += [run.decode(errors="replace"), REPLACEMENT]
            run = bytearray()
    return "".join([*parts, run.decode(errors="replace")])


@pytest.fixture(scope="module", params=KINDS)
def kind(request: Any, tmp_path_factory: Any, tiny_config: Any, tokenizer_kinds: ModuleType) -> Kind:
    return Kind(request.param, tmp_path_factory.mktemp(request.param), tiny_config, tokenizer_kinds)


def ids_of(kind: Kind, data: st.DataObject, most: int = 24) -> list[int]:
    """Random ids, and stretches of real text among them, now and then cut or damaged."""
    single = st.one_of(st.sampled_from(kind.ids), st.integers(0, VOCABULARY - 1)).map(lambda token: [token])
    stretch = st.tuples(st.integers(0, len(kind.ids) - 1), st.integers(1, 12)).map(
        lambda place: kind.ids[place[0] : place[0] + place[1]]
    )
    runs = data.draw(st.lists(st.one_of(single, stretch), max_size=most // 2))
    return [token for run in runs for token in run][:most]


def common_prefix(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(letter for letter, _ in same)


def every_kind(examples: int) -> Callable[[Any], Any]:
    return settings(deadline=None, derandomize=True, max_examples=examples, database=None)


@given(data=st.data())
@every_kind(40)
def test_streamed_text_is_the_decoded_text(kind: Kind, data: st.DataObject) -> None:
    ids = ids_of(kind, data)
    stream = kind.tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    rest = stream.rest
    assert "".join([*pieces, rest]) == kind.decode(ids) == kind.tokenizer.decode(ids)
    assert (stream.finish(), stream.rest, stream.finish()) == (rest, "", "")


@given(data=st.data())
@every_kind(20)
def test_text_is_given_out_exactly_when_nothing_can_change_it(kind: Kind, data: st.DataObject) -> None:
    """What was given out is what all continuations agree on; only U+FFFD may come later."""
    ids = ids_of(kind, data, most=10)
    stream = kind.tokenizer.stream()
    given_out = ""
    for end in range(1, len(ids) + 1):
        given_out += stream.push(ids[end - 1])
        certain = common_prefix([kind.decode(ids[:end] + more) for more in [[], *kind.continuations()]])
        assert certain.startswith(given_out), "no part of a character, nothing that may become another"
        assert not certain[len(given_out) :].strip(REPLACEMENT), "every character that is certain"


@given(data=st.data())
@every_kind(40)
def test_a_stream_goes_on_after_any_ids(kind: Kind, data: st.DataObject) -> None:
    """Wherever ids are cut into context and continuation, the pieces are those of the uncut stream."""
    ids = ids_of(kind, data)
    stream = kind.tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    for cut in range(len(ids) + 1):
        going_on = kind.tokenizer.stream(ids[:cut])
        assert [going_on.push(token) for token in ids[cut:]] == pieces[cut:]
        assert going_on.rest == stream.rest


@given(data=st.data())
@every_kind(20)
def test_a_text_that_ended_leaves_nothing_behind(kind: Kind, data: st.DataObject) -> None:
    before, after = ids_of(kind, data, most=10), ids_of(kind, data, most=10)
    ended, going_on = kind.tokenizer.stream(before), kind.tokenizer.stream([*before, TEXT_END])
    ended.finish()
    assert going_on.rest == ""
    assert [going_on.push(token) for token in after] == [ended.push(token) for token in after]


@pytest.mark.parametrize("kind", KINDS[1:], indirect=True)  # bytes are decoded one by one
@pytest.mark.parametrize("filler", [[], ["special"], ["nothing"]])
def test_long_text_costs_no_more_per_id(kind: Kind, filler: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand ids in, the longest decode is as short as at the beginning; so is a context's."""
    text = kind.tokenizer._text  # type: ignore[attr-defined]
    hidden = {"special": text._library.token_to_id("</s>"), "nothing": VOCABULARY - 1}
    ids = [token for word in kind.ids for token in (word, *(hidden[name] for name in filler))] * 30
    lengths: list[int] = []
    decode = type(text).decode

    def counted(self: Any, ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(type(text), "decode", counted)
    stream = kind.tokenizer.stream()
    for token in ids:
        stream.push(token)
    assert max(lengths) <= len(SAMPLE) + 12
    assert len(lengths) <= 3 * len(ids)
    lengths.clear()
    kind.tokenizer.stream(ids)
    assert sum(lengths) <= 500


@pytest.mark.parametrize("kind", ["nothing"], indirect=True)
def test_tokens_without_text_in_a_row_are_forgotten(kind: Kind) -> None:
    stream: Any = kind.tokenizer.stream()
    ids = [0, *[1] * 300, 2]
    assert "".join(map(stream.push, ids[:-1])) == "a"
    assert len(stream._window) <= 10
    assert stream.push(2) == kind.tokenizer.stream(ids[:-1]).push(2) == " b"
    assert kind.decode(ids) == "a b"


@pytest.mark.parametrize("kind", ["llama", "metaspace_bytes"], indirect=True)
def test_a_run_of_bytes_comes_out_where_it_ends_or_breaks(kind: Kind) -> None:
    """The library decides by the whole run, so a character in it is not certain before."""
    place = {"llama": 3, "metaspace_bytes": 1}[kind.name]
    run = [place + byte for byte in "é€".encode()]
    word = kind.tokenizer.encode("b")[-1]
    stream = kind.tokenizer.stream([word])
    assert [stream.push(token) for token in [*run, word]] == ["", "", "", "", "", "é€b"]
    assert [stream.push(token) for token in [*run, place + 0xFF, place + 0x41, word]] == [
        *[""] * 5,
        REPLACEMENT * 6,
        REPLACEMENT,
        "b",
    ]


def test_complete_characters_in_front_of_an_incomplete_one_come_at_once(
    tiny_config: Any, tmp_path: Path, tokenizer_kinds: ModuleType
) -> None:
    kind = Kind("byte_level", tmp_path, tiny_config, tokenizer_kinds)
    library = kind.tokenizer._text._library  # type: ignore[attr-defined]
    crossing = [index for index in range(256, 264) if "a" in library.id_to_token(index)]
    stream = kind.tokenizer.stream(list("😀".encode())[:3])
    assert stream.push(crossing[0]) == "😀a"
    assert stream.rest == REPLACEMENT


def test_ids_that_the_library_decodes_only_with_others(
    tiny_config: Any, tmp_path: Path, tokenizer_kinds: ModuleType
) -> None:
    """Its decoder that strips both ends panics on a text of one space; what that may become is still certain."""
    kind = Kind("both_ends", tmp_path, tiny_config, tokenizer_kinds)
    a, space = (kind.tokenizer._text._library.token_to_id(word) for word in ("a", "▁"))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="failed to decode"):
        kind.tokenizer.decode([space])
    for ids in ([space, a], [a, *[space] * 20, a], [space, *[a, space] * 12, a]):
        for cut in range(len(ids)):
            stream, going_on = kind.tokenizer.stream(), kind.tokenizer.stream(ids[:cut])
            pieces = [stream.push(token) for token in ids]
            assert "".join([*pieces, stream.finish()]) == kind.decode(ids)
            assert [going_on.push(token) for token in ids[cut:]] == pieces[cut:]
