"""Generation is prefill and steps with a choice between them, stops where it was told, and streams whole text."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from crt_export.bundle.manifest import sealed
from crt_export.errors import InputError, MissingDependencyError
from crt_export.runtime import (
    GenerationOptions,
    SamplingOptions,
    generate_text,
    load_bundle,
    sample_token,
)

TARGET = "ort-cpu-fp32"
PROMPT = [72, 101, 108, 108]
SAMPLED = SamplingOptions(temperature=1.0, top_k=50, seed=11)


def run(generation: Any) -> list[list[int | None]]:
    return list(generation)


def by_hand(bundle: Any, prompt: list[int], count: int, sampling: SamplingOptions, row: int = 0) -> list[int]:
    """The loop a user would write."""
    with bundle.session(TARGET) as session:
        logits, tokens = session.prefill([prompt]), []
        for step in range(count):
            tokens.append(sample_token(logits[0], sampling, row=row, step=step))
            logits = session.step([tokens[-1]])
        return tokens


@pytest.mark.parametrize("sampling", [SamplingOptions(), SAMPLED], ids=["greedy", "sampled"])
def test_it_is_the_loop_written_by_hand(either: Any, sampling: SamplingOptions) -> None:
    session = either.bundle.session(TARGET)
    generation = session.generate([PROMPT], GenerationOptions(max_new_tokens=8, sampling=sampling, ignore_eos=True))
    given = run(generation)
    assert [row[0] for row in given] == generation.tokens[0] == by_hand(either.bundle, PROMPT, 8, sampling)
    assert generation.stop_reasons == ["max_new_tokens"]
    # The last token has been given out, not fed to the model.
    assert session.position.tolist() == [len(PROMPT) + 7]


def test_the_seed_decides_and_nothing_else(crt: Any) -> None:
    def sampled(seed: int) -> list[int]:
        options = GenerationOptions(max_new_tokens=12, sampling=SamplingOptions(temperature=2.0, seed=seed))
        with crt.bundle.session(TARGET) as session:
            generation = session.generate([PROMPT], options)
            run(generation)
        return generation.tokens[0]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_rows_of_a_batch_draw_and_stop_on_their_own(crt: Any) -> None:
    prompts = [PROMPT, [90], [100, 101, 102]]
    alone = [by_hand(crt.bundle, prompt, 10, SAMPLED, row=row) for row, prompt in enumerate(prompts)]
    stop = alone[1][2]
    session = crt.bundle.session(TARGET, batch=3)
    options = GenerationOptions(max_new_tokens=10, sampling=SAMPLED, stop_token_ids=(stop,))
    generation = session.generate(prompts, options)
    given = run(generation)
    for row, tokens in enumerate(alone):
        expected = tokens[: tokens.index(stop)] if stop in tokens else tokens
        assert generation.tokens[row] == expected
        assert generation.stop_reasons[row] == ("stop_token" if stop in tokens else "max_new_tokens")
        assert [step[row] for step in given if step[row] is not None] == expected
        # A stopped row is frozen: only what was fed before the stop is in its cache.
        fed = len(expected) if stop in tokens else len(expected) - 1
        assert session.position[row] == len(prompts[row]) + fed


def test_the_end_of_sequence_token_stops_unless_ignored(plain: Any) -> None:
    (eos,) = plain.bundle.model.eos_token_ids
    sampling = SamplingOptions(temperature=3.0, seed=5)
    with plain.bundle.session(TARGET, capacity=64) as session:
        ignoring = session.generate([PROMPT], GenerationOptions(max_new_tokens=50, sampling=sampling, ignore_eos=True))
        run(ignoring)
    stop = ignoring.tokens[0][5]
    with plain.bundle.session(TARGET) as session:
        session.eos_token_ids = (stop,)
        stopping = session.generate([PROMPT], GenerationOptions(max_new_tokens=10, sampling=sampling))
        run(stopping)
    assert eos == 3
    assert stopping.stop_reasons == ["stop_token"]
    assert stopping.tokens[0] == ignoring.tokens[0][: ignoring.tokens[0].index(stop)]


def test_prompt_and_new_tokens_may_fill_the_capacity_exactly(crt: Any) -> None:
    with crt.bundle.session(TARGET, capacity=8) as session:
        assert len(run(session.generate([PROMPT], GenerationOptions(max_new_tokens=4)))) == 4
    with (
        crt.bundle.session(TARGET, capacity=8) as session,
        pytest.raises(InputError, match="row 0: 0 tokens in the cache and 9 more exceed the capacity of 8"),
    ):
        session.generate([PROMPT], GenerationOptions(max_new_tokens=5))


def test_a_generation_continues_what_the_session_holds(crt: Any) -> None:
    session = crt.bundle.session(TARGET)
    session.prefill([PROMPT])
    found = session.generate([[60, 61]], GenerationOptions(max_new_tokens=3))
    run(found)
    again = crt.bundle.session(TARGET)
    again.prefill([PROMPT])
    logits = again.prefill([[60, 61]])
    assert found.tokens[0][0] == int(np.argmax(logits[0]))


@pytest.mark.parametrize("prompt", ["Hello", "Grüße, 世界 "])
def test_text_is_streamed_in_whole_characters(crt: Any, prompt: str) -> None:
    options = GenerationOptions(max_new_tokens=8, sampling=SAMPLED)
    generation = generate_text(crt.bundle, prompt, options)
    with pytest.raises(InputError, match="has not ended"):
        _ = generation.result
    pieces = list(generation)
    result = generation.result
    expected = by_hand(crt.bundle, list(prompt.encode()), 8, SAMPLED)
    assert list(result.token_ids) == expected
    assert "".join(pieces) == result.text == bytes(expected).decode(errors="replace")
    assert all(pieces)
    assert (result.prompt_tokens, result.new_tokens) == (len(prompt.encode()), 8)
    assert (result.stop_reason, result.target) == ("max_new_tokens", TARGET)


def test_a_text_that_failed_or_was_closed_says_so(crt: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the printer is on fire")

    failed = generate_text(crt.bundle, "Hello", GenerationOptions(max_new_tokens=4), on_token=fail)
    with pytest.raises(RuntimeError, match="printer"):
        next(failed)
    closed = generate_text(crt.bundle, "Hello", GenerationOptions(max_new_tokens=4))
    closed.close()
    for generation, reason in ((failed, r"failed \(the printer is on fire\)"), (closed, "was closed")):
        with pytest.raises(InputError, match=f"the generation {reason} before its end and has no result"):
            _ = generation.result
    options: Any = {"max_new_tokens": 3}
    with pytest.raises(InputError, match="options must be GenerationOptions"):
        generate_text(crt.bundle, "Hello", options)


@pytest.mark.parametrize(
    "sampling", [SamplingOptions(), SAMPLED, SamplingOptions(repetition_penalty=2)], ids=["greedy", "sampled", "penal"]
)
def test_a_reset_in_the_middle_is_named(crt: Any, sampling: SamplingOptions) -> None:
    session = crt.bundle.session(TARGET)
    generation = session.generate([PROMPT], GenerationOptions(max_new_tokens=4, sampling=sampling))
    next(generation)
    session.reset()
    with pytest.raises(InputError, match="row 0 holds no token: its session was reset while"):
        next(generation)


def test_text_that_cannot_be_generated_is_refused_at_once(crt: Any) -> None:
    with pytest.raises(InputError, match="empty prompt"):
        generate_text(crt.bundle, "")
    with pytest.raises(InputError, match=r"the prompt has 62 tokens; with 3 new ones .* capacity of 64"):
        generate_text(crt.bundle, "x" * 62, GenerationOptions(max_new_tokens=3))
    with pytest.raises(InputError, match="unknown target"):
        generate_text(crt.bundle, "x", target="other")


def copy_with_tokenizer(crt: Any, folder: Path, name: str) -> Path:
    """The bundle with another tokenizer; a ``tokenizer.json`` is byte-level with a few merges."""
    copy = shutil.copytree(crt.bundle.files.path, folder / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"]["tokenizer"] = name
    if name == "tokenizer.json":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        library = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        library.save(str(copy / name))
        content = (copy / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    return copy


def test_a_model_without_tokenizer_takes_ids_only(crt: Any, tmp_path: Path) -> None:
    with load_bundle(copy_with_tokenizer(crt, tmp_path, "none"), allow_unvalidated=True) as bundle:
        with pytest.raises(InputError, match="give token ids"):
            generate_text(bundle, "Hello")
        session = bundle.session(TARGET)
        generation = session.generate([PROMPT], GenerationOptions(max_new_tokens=2))
        assert len(run(generation)) == 2
        assert (generation.texts, generation.pieces) == ([""], [""])
        with pytest.raises(InputError, match="stop strings need text, and this model has no tokenizer"):
            session.generate([PROMPT], GenerationOptions(max_new_tokens=2, stop_strings=("a",)))


def test_a_tokenizer_file_streams_whole_characters_and_stops_at_strings(crt: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "sampling": SAMPLED}
    with load_bundle(copy_with_tokenizer(crt, tmp_path, "tokenizer.json"), allow_unvalidated=True) as bundle:
        free = generate_text(bundle, "Grüße", GenerationOptions(**options))
        pieces = list(free)
        assert "".join(pieces) == free.result.text == bundle.tokenizer.decode(free.result.token_ids)
        stop = free.result.text[3:5]
        stopped = generate_text(bundle, "Grüße", GenerationOptions(**options, stop_strings=(stop,)))
        assert "".join(stopped) == free.result.text[: free.result.text.index(stop)]
        assert stopped.result.stopped_by == stop


def test_without_the_tokenizers_library_there_are_ids_but_no_text(
    crt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with load_bundle(copy_with_tokenizer(crt, tmp_path, "tokenizer.json"), allow_unvalidated=True) as bundle:
        session = bundle.session(TARGET)
        generation = session.generate([PROMPT], GenerationOptions(max_new_tokens=2))
        assert len(run(generation)) == 2
        assert generation.texts == [""]
        with pytest.raises(MissingDependencyError, match="tokenizers"):
            session.generate([PROMPT], GenerationOptions(max_new_tokens=2, stop_strings=("a",)))
