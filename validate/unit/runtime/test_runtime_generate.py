"""Generation is prefill and steps with a choice between them, stops where it was told, and streams whole text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.errors import InputError
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
    eos = plain.bundle.config.eos_token_id
    sampling = SamplingOptions(temperature=3.0, seed=5)
    with plain.bundle.session(TARGET, capacity=64) as session:
        ignoring = session.generate([PROMPT], GenerationOptions(max_new_tokens=50, sampling=sampling, ignore_eos=True))
        run(ignoring)
    stop = ignoring.tokens[0][5]
    with plain.bundle.session(TARGET) as session:
        session.eos_token_id = stop
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


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"stop_token_ids": (-1,)}])
def test_impossible_generation_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be at least"):
        GenerationOptions(**options)


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


def test_text_that_cannot_be_generated_is_refused_at_once(crt: Any) -> None:
    with pytest.raises(InputError, match="empty prompt"):
        generate_text(crt.bundle, "")
    with pytest.raises(InputError, match=r"the prompt has 30 tokens; with 3 new ones .* capacity of 32"):
        generate_text(crt.bundle, "x" * 30, GenerationOptions(max_new_tokens=3))
    with pytest.raises(InputError, match="unknown target"):
        generate_text(crt.bundle, "x", target="other")


@pytest.fixture
def without_tokenizer(crt: Any, tmp_path: Path) -> Iterator[Any]:
    folder = shutil.copytree(crt.bundle.files.path, tmp_path / "bundle")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokenizer": "byte"', '"tokenizer": "none"'))
    with load_bundle(folder, allow_unvalidated=True) as bundle:
        yield bundle


def test_a_model_without_tokenizer_takes_ids_only(without_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="give token ids"):
        generate_text(without_tokenizer, "Hello")
    generation = without_tokenizer.session(TARGET).generate([PROMPT], GenerationOptions(max_new_tokens=2))
    assert len(run(generation)) == 2
