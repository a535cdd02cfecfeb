"""Whole generations, both languages: random prompts, options and stops give the same tokens, texts and reasons."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from crt_export.errors import ContractError
from crt_export.runtime import Bundle, GenerationOptions, SamplingOptions

TARGET = "ort-cpu-fp32"
ROUNDS = 40
OVERFLOWING_TOKEN = 7  # see validate/conftest.py: both languages refuse what follows it

Steps = list[list[int]]


def random_request(generator: random.Random) -> tuple[list[list[int]], dict[str, Any]]:
    """Prompts of one to three rows, and sampling options."""
    tokens = [token for token in range(256) if token != OVERFLOWING_TOKEN]
    prompts = [generator.choices(tokens, k=generator.randint(1, 6)) for _ in range(generator.randint(1, 3))]
    sampling = {
        "temperature": generator.choice([0.0, 0.6, 1.0, 2.0]),
        "top_k": generator.choice([0, 3, 40]),
        "top_p": generator.choice([1.0, 0.8]),
        "min_p": generator.choice([0.0, 0.1]),
        "repetition_penalty": generator.choice([1.0, 1.3]),
        "seed": generator.randrange(2**32),
    }
    return prompts, sampling


def random_stops(generator: random.Random, texts: list[str], tokens: list[list[int]]) -> dict[str, Any]:
    """Up to three pieces of the texts as stop strings, now and then one of the tokens as stop token."""
    strings = []
    for text in generator.choices(texts, k=generator.randint(0, 3)):
        begin = generator.randrange(max(len(text), 1))
        strings.append(text[begin : begin + generator.randint(1, 4)])
    ids = [generator.choice(tokens[0])] if generator.random() < 0.3 else []
    # A C string ends at a NUL.
    return {"stop_strings": [text for text in strings if text and "\0" not in text], "stop_tokens": ids}


def in_both(in_python: Any, in_c: Any, prompts: list[list[int]] | None, options: dict[str, Any]) -> Counter[str]:
    """Read the same generation in both languages and compare everything; how its rows stopped."""
    sampling = options.pop("sampling")
    expected = in_python.generate(prompts, GenerationOptions(sampling=SamplingOptions(**sampling), **options))
    steps = [[-1 if token is None else token for token in tokens] for tokens in expected]
    found = in_c.generate(prompts or (), sampling=sampling, **options)
    assert list(found) == steps
    rows = range(len(expected.texts))
    assert [found.tokens(row) for row in rows] == expected.tokens
    assert [found.text(row) for row in rows] == expected.texts
    assert [found.rest(row) for row in rows] == expected.rest
    assert [found.stop_reason(row) for row in rows] == expected.stop_reasons
    assert in_c.position == in_python.position.tolist()
    return Counter(reason for reason in expected.stop_reasons if reason)


def test_random_generations_and_what_follows_them(in_python: Bundle, in_c: Any) -> None:
    generator = random.Random(20261122)
    reasons: Counter[str] = Counter()
    for _ in range(ROUNDS):
        prompts, sampling = random_request(generator)
        session = in_python.session(TARGET, batch=len(prompts), threads=1)
        free = session.generate(prompts, GenerationOptions(max_new_tokens=24, sampling=SamplingOptions(**sampling)))
        try:
            list(free)
        except ContractError:
            continue  # it drew the overflowing token
        stops = random_stops(generator, free.texts, free.tokens)
        other = in_c.session(TARGET, batch=len(prompts), threads=1)
        session.reset()
        for given in (prompts, None):
            options = {"max_new_tokens": generator.randint(1, 12), "sampling": sampling, **stops}
            try:
                reasons += in_both(session, other, given, options)
            except ContractError:
                break
    assert set(reasons) == {"max_new_tokens", "stop_token", "stop_string"}
    assert min(reasons.values()) >= 5


@pytest.mark.parametrize("stop_string", ["", "\0"])
def test_a_stop_string_that_is_empty_in_c_is_refused(in_c: Any, c_library: Any, stop_string: str) -> None:
    with pytest.raises(c_library.CrtError, match="at least one character"):
        in_c.session(TARGET).generate([[65]], stop_strings=[stop_string])
