"""The text of a generation goes on from its prompt, and one that is left and taken up again has the unbroken text."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crt_export.bundle.manifest import sealed
from crt_export.errors import ContractError
from crt_export.runtime import Bundle, GenerationOptions, SamplingOptions, Session, Snapshot, generate_text, load_bundle
from crt_export.text_stream import TEXT_END

TARGET = "ort-cpu-fp32"
COUNT = 24
PROMPT = [3, 1, 4]


@pytest.fixture(params=["byte", "unigram", "word_piece", "word_ends"])
def bundle(crt_path: Path, tmp_path: Path, tokenizer_kinds: ModuleType, request: Any) -> Iterator[Bundle]:
    """A model whose ids are text in a different way; most ids of a tokenizer.json have none here."""
    copy = Path(shutil.copytree(crt_path, tmp_path / "bundle"))
    if request.param != "byte":
        manifest = json.loads((copy / "manifest.json").read_text())
        tokenizer_kinds.write_tokenizer(copy, request.param)
        content = (copy / "tokenizer.json").read_bytes()
        manifest["model"]["tokenizer"] = "tokenizer.json"
        manifest["files"]["tokenizer.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with load_bundle(copy, allow_unvalidated=True) as opened:
        yield opened


def options(count: int, seed: int, **more: Any) -> GenerationOptions:
    sampling = SamplingOptions(temperature=2.0, seed=seed)
    return GenerationOptions(max_new_tokens=count, sampling=sampling, ignore_eos=True, **more)


def read(session: Session, prompts: Any, chosen: GenerationOptions) -> tuple[list[int], list[str], str | None]:
    """Tokens, the piece of each, and the reason."""
    pieces: list[str] = []
    generation = session.generate(prompts, chosen, on_token=lambda row, token, piece: pieces.append(piece))
    list(generation)
    assert "".join(pieces) == generation.texts[0]
    return generation.tokens[0], pieces, generation.stop_reasons[0]


def sound_seeds(bundle: Bundle, count: int) -> list[int]:
    """Seeds with which the model never draws the token that makes its state infinite, see conftest.py."""
    seeds = []
    with bundle.session(TARGET) as session:
        for seed in itertools.count():
            session.reset()
            with contextlib.suppress(ContractError):
                list(session.generate([PROMPT], options(COUNT, seed)))
                seeds.append(seed)
            if len(seeds) == count:
                return seeds
    raise AssertionError("the loop has no other end")


def moved(session: Session, way: int, folder: Path) -> Session:
    """The session, or another one that goes on from it."""
    if way == 0:
        return session
    if way == 1:
        return session.fork()
    session.snapshot().save(folder / "state")
    other = session if way == 2 else session.fork()
    other.reset()
    other.restore(Snapshot.load(folder / "state"))
    return other


def test_prompt_and_text_are_the_decoded_tokens(bundle: Bundle) -> None:
    decode = bundle.tokenizer.decode
    for seed in sound_seeds(bundle, 12):
        with bundle.session(TARGET) as session:
            generation = session.generate([PROMPT], options(COUNT, seed))
            list(generation)
        stream = bundle.tokenizer.stream()
        before = "".join(map(stream.push, PROMPT))
        assert before + generation.texts[0] + generation.rest[0] == decode([*PROMPT, *generation.tokens[0]])


def test_the_parts_of_a_generation_are_the_unbroken_one(bundle: Bundle, tmp_path: Path) -> None:
    generator = random.Random(5)
    stopped = 0
    for turn, seed in enumerate(sound_seeds(bundle, 16)):
        with bundle.session(TARGET) as session:
            tokens, pieces, _ = read(session, [PROMPT], options(COUNT, seed))
        text = "".join(pieces)
        stops: tuple[str, ...] = ()
        if turn % 2 and len(text) > 2:  # a stop string that lies across tokens, and one that nearly does
            begin = generator.randrange(1, len(text) - 1)
            stops = (text[begin : begin + 2], text[begin - 1 : begin + 1] + "never")
        with bundle.session(TARGET) as session:
            tokens, pieces, reason = read(session, [PROMPT], options(COUNT, seed, stop_strings=stops))
        stopped += reason == "stop_string"
        found: tuple[list[int], list[str]] = ([], [])
        session, given, ended = bundle.session(TARGET), [PROMPT], None
        while len(found[0]) < COUNT and ended != "stop_string":
            count = min(generator.randint(1, 4), COUNT - len(found[0]))
            new, more, ended = read(session, given, options(count, seed, stop_strings=stops))
            found[0].extend(new)
            found[1].extend(more)
            session, given = moved(session, generator.randrange(4), tmp_path), None
        assert found == (tokens, pieces)
        assert ended == reason
    assert stopped


def test_a_callback_ends_a_row_without_losing_text(bundle: Bundle) -> None:
    (seed,) = sound_seeds(bundle, 1)
    with bundle.session(TARGET) as session:
        _, pieces, _ = read(session, [PROMPT], options(COUNT, seed))
    with bundle.session(TARGET) as session:
        found: list[str] = []
        for turn in range(COUNT):
            generation = session.generate([PROMPT] if turn == 0 else None, options(2, seed), on_token=lambda *_: False)
            list(generation)
            found.append(generation.pieces[0])
    assert found == pieces


def test_a_prompt_begins_another_text(bundle: Bundle) -> None:
    """What was held back stays with the earlier generation, in its rest."""
    (seed,) = sound_seeds(bundle, 1)
    chosen = options(4, seed)
    with bundle.session(TARGET) as session, bundle.session(TARGET) as fresh:
        tokens, _, _ = read(session, [PROMPT], options(5, seed))
        session.history.held[0] = 2
        first = session.generate([[70, 71]], chosen)
        list(first)
        second = fresh.generate([[*PROMPT, *tokens, 70, 71]], chosen)
        fresh.history.drawn[0] = 5
        list(second)
        assert first.tokens == second.tokens
        assert (first.texts, first.rest) == (second.texts, second.rest)


def test_a_stop_token_ends_the_text(crt: Any) -> None:
    """What is incomplete comes out as U+FFFD, and what follows it is text of its own."""
    with crt.bundle.session(TARGET) as session:
        session.prefill([[65, 0xC3]])
        everything = tuple(range(session.vocab_size))
        generation = session.generate(None, GenerationOptions(max_new_tokens=4, stop_token_ids=everything))
        list(generation)
        assert (generation.texts, generation.rest, generation.stop_reasons) == (["\ufffd"], [""], ["stop_token"])
        assert session.history.recent[0, -2:].tolist() == [0xC3, TEXT_END]
        session.history.pending[0] = 0xA9
        after = session.generate(None, GenerationOptions(max_new_tokens=1, ignore_eos=True))
        list(after)
        whole = crt.bundle.tokenizer.stream([0xA9])
        assert after.texts[0] == whole.push(after.tokens[0][0])


def note(calls: list[Any], *call: Any) -> None:
    calls.append(call)


def test_a_streamed_text_is_given_to_its_end(crt: Any) -> None:
    """generate_text() ends for good: what is held back comes out, and the callback sees it."""
    seen_rest = 0
    (seed,) = sound_seeds(crt.bundle, 1)
    for count in range(2, 14):
        with crt.bundle.session(TARGET) as session:
            generation = session.generate([list(b"Hell")], options(count, seed, stop_strings=("Never",)))
            list(generation)
        expected = crt.bundle.tokenizer.decode(generation.tokens[0])
        assert generation.texts[0] + generation.rest[0] == expected
        last = expected[-1] + "never"
        calls: list[tuple[int, int | None, str]] = []
        chosen = options(count, seed, stop_strings=(last,))
        text = generate_text(crt.bundle, "Hell", chosen, on_token=partial(note, calls))
        pieces = list(text)
        assert "".join(pieces) == text.result.text == expected == "".join(piece for _, _, piece in calls)
        assert (text.result.stop_reason, list(text.result.token_ids)) == ("max_new_tokens", generation.tokens[0])
        seen_rest += calls[-1] == (0, None, expected[-1])
    assert seen_rest >= 6
