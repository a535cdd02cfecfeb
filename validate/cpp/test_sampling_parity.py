"""The C++ sampler draws what the Python sampler draws: every option, thousands of draws, hostile logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crt_export.errors import ContractError
from crt_export.runtime.sampling import SamplingOptions, sample_token

DRAWS = 3000
REFUSED = "contract"
CHOICES: dict[str, list[Any]] = {
    "temperature": [0.0, 5e-324, 1e-300, 1e-3, 0.5, 0.7, 1.0, 1.3, 3.0, 100.0, 1e308],
    "top_k": [0, 1, 2, 5, 40, 258, 10_000],
    "top_p": [1.0, 1 - 2.0**-53, 0.95, 0.5, 1e-9],
    "min_p": [0.0, 0.0, 1e-300, 1e-18, 0.05, 0.5, 1.0],
    "repetition_penalty": [1.0, 1.1, 2.0, 0.5, 1e-300, 1e300],
}


def hostile_logits(generator: np.random.Generator) -> np.ndarray:
    """float32 [vocab]: plain, with ties, with -inf, all equal, huge, with both zeros; now and then not usable."""
    vocab = int(generator.choice([1, 2, 3, 40, 259, 900]))
    scale = 10.0 ** generator.uniform(-3, 3)
    logits = generator.standard_normal(vocab) * scale
    kind = generator.integers(6)
    if kind == 1:
        logits = np.round(logits / scale)
    elif kind == 2:
        logits[generator.random(vocab) < 0.4] = -np.inf
    elif kind == 3:
        logits[:] = logits[0]
    elif kind == 4:
        logits *= 1e30
    elif kind == 5:
        logits = generator.choice([0.0, -0.0, 1.0, -1.0], vocab)
    if generator.random() < 0.02:
        logits[generator.integers(vocab)] = generator.choice([np.nan, np.inf])
    return logits.astype(np.float32)


def by_python(logits: np.ndarray, seen: np.ndarray, sampling: dict[str, Any], row: int, step: int) -> int | str:
    """The token, or what kind of refusal."""
    try:
        return sample_token(logits, SamplingOptions(**sampling), row=row, step=step, seen=seen)
    except ContractError:
        return REFUSED


def test_every_combination_of_options_draws_the_same_token(library: Any, c_library: Any) -> None:
    def by_cpp(logits: np.ndarray, seen: np.ndarray, sampling: dict[str, Any], row: int, step: int) -> int | str:
        try:
            return library.sample_token(logits, seen, row=row, step=step, **sampling)
        except c_library.CrtError as error:
            return error.kind

    generator = np.random.default_rng(20261122)
    outcomes = []
    for _ in range(DRAWS):
        logits = hostile_logits(generator)
        seen = (generator.random(logits.size) < generator.choice([0.0, 0.2, 0.9])).astype(np.uint8)
        sampling = {name: generator.choice(values).item() for name, values in CHOICES.items()}
        sampling["seed"] = int(generator.integers(2**32))
        row, step = int(generator.integers(2**32)), int(generator.integers(2**63))
        expected = by_python(logits, seen, sampling, row, step)
        outcomes.append(expected)
        assert by_cpp(logits, seen, sampling, row, step) == expected, (sampling, row, step, logits.size)
    # The comparison says something only if both sides drew: many different tokens, and some refusals.
    assert len(set(outcomes)) > 200
    assert 10 < outcomes.count(REFUSED) < DRAWS / 4


@pytest.mark.parametrize("temperature", [0.8, 1.0, 2.5])
def test_one_seed_gives_the_same_thousand_tokens(library: Any, temperature: float) -> None:
    generator = np.random.default_rng(3)
    logits = (generator.standard_normal(259) * 2).astype(np.float32)
    sampling = {"temperature": temperature, "top_k": 100, "top_p": 0.95, "min_p": 0.01, "seed": 42}
    options = SamplingOptions(**sampling)
    expected = [sample_token(logits, options, row=1, step=step) for step in range(1000)]
    assert [library.sample_token(logits, row=1, step=step, **sampling) for step in range(1000)] == expected
    assert len(set(expected)) > 20
