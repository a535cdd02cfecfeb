"""What ends a row: stop tokens, stop strings, the callback; and what comes out when it ends."""

from __future__ import annotations

from typing import Any

import pytest

from crt_export.errors import InputError
from crt_export.runtime import Generation, GenerationOptions, SamplingOptions, generate_text
from crt_export.runtime import generate as generate_module

TARGET = "ort-cpu-fp32"
PROMPT = [72, 101, 108, 108]
SAMPLED = SamplingOptions(temperature=1.0, top_k=50, seed=11)
COUNT = 10


def run(bundle: Any, prompts: list[list[int]] | None = None, **changes: Any) -> tuple[Generation, list[Any], list[str]]:
    """A finished generation, the tokens it gave step by step, and the pieces of every row put together."""
    on_token = changes.pop("on_token", None)
    options = GenerationOptions(**{"max_new_tokens": COUNT, "sampling": SAMPLED, **changes})
    rows = prompts or [PROMPT]
    with bundle.session(TARGET, batch=len(rows)) as session:
        generation = session.generate(rows, options, on_token=on_token)
        given, pieces = [], ["" for _ in rows]
        for tokens in generation:
            given.append(tokens)
            pieces = [text + piece for text, piece in zip(pieces, generation.pieces, strict=True)]
    return generation, given, pieces


def test_a_stop_string_ends_the_row_and_its_text(crt: Any) -> None:
    free, _, _ = run(crt.bundle)
    text = free.texts[0]
    for begin in range(len(text) - 1):
        stop = text[begin : begin + 2]
        generation, given, pieces = run(crt.bundle, stop_strings=("never there", stop))
        assert (generation.stop_reasons, generation.stopped_by) == (["stop_string"], [stop])
        assert generation.texts[0] == pieces[0] == text[: text.index(stop)]
        # The tokens that made the stop string count, and nothing was drawn after them.
        tokens = generation.tokens[0]
        assert tokens == free.tokens[0][: len(tokens)] == [row[0] for row in given]
        assert len(tokens) >= begin or text.index(stop) < begin


def test_rows_stop_on_their_own_and_stay_frozen(crt: Any) -> None:
    prompts = [PROMPT, [90], [100, 101, 102]]
    free, _, _ = run(crt.bundle, prompts)
    stop = free.texts[1][3:5]
    assert stop not in free.texts[0]
    token = free.tokens[2][4]
    assert token not in [*free.tokens[0], *free.tokens[1]]
    options = GenerationOptions(max_new_tokens=COUNT, sampling=SAMPLED, stop_strings=(stop,), stop_token_ids=(token,))
    with crt.bundle.session(TARGET, batch=3) as session:
        generation = session.generate(prompts, options)
        positions = []
        for _ in generation:
            positions.append([None if r else p for r, p in zip(generation.stop_reasons, session.position, strict=True)])
        ended = session.position.tolist()
        first = free.tokens[2].index(token)
        assert generation.stop_reasons == ["max_new_tokens", "stop_string", "stop_token"]
        assert generation.stopped_by == [None, stop, token]
        assert generation.tokens == [
            free.tokens[0],
            free.tokens[1][: len(generation.tokens[1])],
            free.tokens[2][:first],
        ]
        # A row is fed all it gave out but the last token; before a stop token that one as well.
        assert ended == [4 + COUNT - 1, 1 + len(generation.tokens[1]) - 1, 3 + first]
        assert session.history.drawn.tolist() == [COUNT, len(generation.tokens[1]), first + 1]


def test_text_held_back_comes_out_before_a_stop_token(crt: Any) -> None:
    free, _, _ = run(crt.bundle)
    token = free.tokens[0][-1]
    cut = free.tokens[0].index(token)
    before, _, _ = run(crt.bundle, max_new_tokens=cut)
    stop = before.texts[0][-1] + "and more"
    calls: list[tuple[int, int | None, str]] = []
    generation, given, pieces = run(
        crt.bundle, stop_strings=(stop,), stop_token_ids=(token,), on_token=lambda *call: calls.append(call)
    )
    assert (generation.stop_reasons, generation.stopped_by) == (["stop_token"], [token])
    assert generation.texts[0] == pieces[0] == before.texts[0]
    assert given[-1] == [None], "no token, but text"
    assert calls[-1][:2] == (0, None)
    assert "".join(piece for _, _, piece in calls) == before.texts[0]


def test_the_callback_sees_every_token_and_may_end_a_row(crt: Any) -> None:
    prompts = [PROMPT, [90]]
    free, _, _ = run(crt.bundle, prompts)
    calls: list[tuple[int, int | None, str]] = []

    def on_token(row: int, token: int | None, piece: str) -> bool:
        calls.append((row, token, piece))
        return not (row == 1 and sum(call[0] == 1 for call in calls) == 3)

    generation, _, pieces = run(crt.bundle, prompts, on_token=on_token)
    assert generation.stop_reasons == ["max_new_tokens", "callback"]
    assert generation.stopped_by == [None, None]
    assert generation.tokens == [free.tokens[0], free.tokens[1][:3]]
    assert [token for row, token, _ in calls if row == 0] == free.tokens[0]
    assert [token for row, token, _ in calls if row == 1] == free.tokens[1][:3]
    assert "".join(piece for row, _, piece in calls if row == 0) == generation.texts[0]
    assert pieces == generation.texts


def test_a_callback_that_returns_nothing_or_comes_with_the_last_token_changes_no_reason(crt: Any) -> None:
    generation, _, _ = run(crt.bundle, on_token=lambda *_: None)
    assert generation.stop_reasons == ["max_new_tokens"]
    generation, _, _ = run(crt.bundle, max_new_tokens=1, on_token=lambda *_: False)
    assert generation.stop_reasons == ["max_new_tokens"]


def test_a_failing_callback_loses_no_token(crt: Any) -> None:
    prompts = [PROMPT, [90]]
    free, _, _ = run(crt.bundle, prompts)
    failures = iter([False, True, False])

    def on_token(row: int, token: int | None, piece: str) -> None:
        if next(failures, False):
            raise OSError("the listener has gone")

    options = GenerationOptions(max_new_tokens=COUNT, sampling=SAMPLED)
    with crt.bundle.session(TARGET, batch=2) as session:
        generation = session.generate(prompts, options, on_token=on_token)
        with pytest.raises(OSError, match="gone"):
            next(generation)
        list(generation)
    assert generation.tokens == free.tokens


def test_only_a_penalty_or_a_temperature_looks_at_the_logits(crt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class LooksAtLogits(Exception):
        pass

    def sample(*_: Any, **__: Any) -> int:
        raise LooksAtLogits

    monkeypatch.setattr(generate_module, "sample_token", sample)
    run(crt.bundle, sampling=SamplingOptions(top_k=4, seed=9))
    for sampling in (SamplingOptions(temperature=0.5), SamplingOptions(repetition_penalty=1.1)):
        with pytest.raises(LooksAtLogits):
            run(crt.bundle, sampling=sampling)


def test_streamed_text_ends_before_the_stop_string(crt: Any) -> None:
    options = {"max_new_tokens": COUNT, "sampling": SAMPLED}
    free = generate_text(crt.bundle, "Hell", GenerationOptions(**options))
    text = "".join(free)
    stop = text[4:6]
    generation = generate_text(crt.bundle, "Hell", GenerationOptions(**options, stop_strings=[stop]))
    pieces = list(generation)
    assert all(pieces)
    assert "".join(pieces) == generation.result.text == text[: text.index(stop)]
    assert (generation.result.stop_reason, generation.result.stopped_by) == ("stop_string", stop)
    stopped = generate_text(crt.bundle, "Hell", GenerationOptions(**options), on_token=lambda *_: False)
    list(stopped)
    assert (stopped.result.stop_reason, stopped.result.new_tokens) == ("callback", 1)


def test_a_streamed_text_may_be_left_early(crt: Any) -> None:
    text = generate_text(crt.bundle, "Hell", GenerationOptions(max_new_tokens=20, sampling=SAMPLED))
    next(text)
    text.close()
    text.close()
    with pytest.raises(InputError, match="closed"):
        next(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
        ({"max_new_tokens": True}, "max_new_tokens must be at least 1"),
        ({"stop_token_ids": (-1, 2.5)}, r"(?s)2 problems.*stop token id -1 must be at least 0.*2.5"),
        ({"stop_token_ids": 10}, r"stop_token_ids must be a list of token ids such as \(10,\), found 10"),
        ({"stop_strings": "###"}, r"stop_strings must be a list of strings such as \('###',\), found '###'"),
        ({"stop_strings": ("", 3)}, r"(?s)stop string '' must be .*stop string 3 must be"),
        ({"stop_strings": ("\udcff",)}, r"stop string '\\udcff' must be valid Unicode"),
        ({"passes": 0}, "passes must be at least 1"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false"),
        ({"sampling": None}, "sampling must be SamplingOptions, found None"),
        ({"max_new_tokens": 0, "stop_strings": ("",), "passes": 0}, "3 problems"),
    ],
)
def test_impossible_generation_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerationOptions(**options)
