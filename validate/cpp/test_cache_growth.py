"""Caches grow with their rows alike in both languages, and no row notices how long the others are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.runtime import load_bundle

TARGET = "ort-cpu-fp32"
CLOSE = {"rtol": 0, "atol": 1e-5}
LONG = [32 + index % 200 for index in range(125)]


pytestmark = pytest.mark.evidence


@pytest.fixture(scope="session")
def roomy(tiny_bundle: Callable[..., tuple[Path, Any]]) -> Path:
    """A model with room for more than two blocks of its caches."""
    return tiny_bundle("roomy", num_hidden_layers=1, unroll_steps=2, max_position_embeddings=300)[0]


def test_steps_across_blocks_agree(roomy: Path, library: Any) -> None:
    with load_bundle(roomy, allow_unvalidated=True) as bundle:
        sessions = (
            bundle.session(TARGET, threads=1, capacity=300),
            library.bundle(roomy).session(TARGET, threads=1, capacity=300),
        )
        expected, found = (session.prefill([LONG], chunk=20) for session in sessions)
        np.testing.assert_allclose(found, expected, **CLOSE)
        for token in LONG[:10] + LONG[:10]:
            expected, found = (session.step([token]) for session in sessions)
            np.testing.assert_allclose(found, expected, **CLOSE)
        expected, found = (session.prefill([LONG]) for session in sessions)
        np.testing.assert_allclose(found, expected, **CLOSE)


def test_a_row_gets_the_same_bits_beside_a_longer_one(roomy: Path, library: Any) -> None:
    beside, apart = (library.bundle(roomy).session(TARGET, batch=2, threads=1, capacity=300) for _ in range(2))
    beside.prefill([LONG + LONG, []])
    for session in (beside, apart):
        session.prefill([[], [70, 71, 72]])
    for token in (80, 81, 82):
        found, expected = (session.step([None, token])[1] for session in (beside, apart))
        np.testing.assert_array_equal(found, expected)
