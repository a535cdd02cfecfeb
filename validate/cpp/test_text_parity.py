"""The C++ text stream gives the pieces that Python's incremental UTF-8 decoder gives, byte for byte."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from ctypes import byref, c_int64, c_size_t, c_void_p, string_at
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from crt_export.runtime import load_bundle
from crt_export.tokenizer import Tokenizer

# The first and last byte of every range that UTF-8 tells apart, and ids that are no bytes.
EDGES = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE]
EDGES += [0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF, 256, -1]

Pieces = Callable[[Sequence[int]], list[str]]


@pytest.fixture(scope="module")
def by_python(tiny: Path) -> Iterator[Pieces]:
    """Pieces of push() per id and of finish()."""
    with load_bundle(tiny, allow_unvalidated=True) as bundle:
        tokenizer: Tokenizer = bundle.tokenizer

        def pieces(ids: Sequence[int]) -> list[str]:
            stream = tokenizer.stream()
            return [*(stream.push(token) for token in ids), stream.finish()]

        yield pieces


@pytest.fixture(scope="module")
def by_cpp(library: Any, c_library: Any, tiny: Path) -> Iterator[Pieces]:
    """The same through crt_text_stream; one stream serves all, for finish() leaves nothing behind."""
    bundle, stream, text, size = c_void_p(), c_void_p(), c_void_p(), c_size_t()
    options = library.options(c_library.BundleOptions, "bundle_options", allow_unvalidated=1)
    library.call("crt_bundle_open", str(tiny).encode(), byref(options), byref(bundle))
    library.call("crt_text_stream_new", bundle, byref(stream))

    def piece(name: str, *arguments: Any) -> str:
        library.call(name, stream, *arguments, byref(text), byref(size))
        return string_at(text.value or 0, size.value).decode()

    def pieces(ids: Sequence[int]) -> list[str]:
        return [*(piece("crt_text_stream_push", c_int64(token)) for token in ids), piece("crt_text_stream_finish")]

    yield pieces
    library.release("crt_text_stream_free", stream)
    library.release("crt_bundle_close", bundle)


def test_every_sequence_of_three_edge_bytes(by_python: Pieces, by_cpp: Pieces) -> None:
    for ids in product(EDGES, repeat=3):
        assert by_cpp(ids) == by_python(ids), ids


def test_random_bytes_and_damaged_text(by_python: Pieces, by_cpp: Pieces) -> None:
    generator = random.Random(7)
    text = list("aé€😀\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff".encode())
    for _ in range(1500):
        ids = [token for token in text if generator.random() > 0.1]
        for _ in range(generator.randrange(6)):
            ids[generator.randrange(len(ids))] = generator.choice([*EDGES, generator.randrange(256)])
        assert by_cpp(ids) == by_python(ids), ids
