"""A row of a batch gets what it gets alone, on every target of a really built bundle and real text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crt_export.runtime import load_bundle

pytestmark = pytest.mark.slow

PROMPTS, STEPS = (5, 17, 9), 25


def _largest_difference(bundle: Path, target: str, text: bytes) -> float:
    """Largest |logit| difference between rows in company and alone; rows start, rest and stop at different times."""
    texts = [text[3000 * row : 3000 * row + 60] for row in range(len(PROMPTS))]
    worst = 0.0
    with load_bundle(bundle) as opened:
        together = opened.session(target, batch=len(texts), threads=1, capacity=64)
        alone = [opened.session(target, threads=1, capacity=64) for _ in texts]
        found = together.prefill([list(text[:size]) for text, size in zip(texts, PROMPTS, strict=True)])
        expected = [
            session.prefill([list(text[:size])])[0] for session, text, size in zip(alone, texts, PROMPTS, strict=True)
        ]
        worst = float(np.abs(found - np.stack(expected)).max())
        for step in range(STEPS):
            tokens = [None if (step + 2 * row) % 5 == 0 else text[30 + step] for row, text in enumerate(texts)]
            found = together.step(tokens)
            for row, token in enumerate(tokens):
                if token is not None:
                    worst = max(worst, float(np.abs(found[row] - alone[row].step([token])[0]).max()))
    return worst


@pytest.mark.parametrize("target", ["ort-cpu-fp32", "ort-cpu-int8"])
def test_batch_mates_change_nothing(bundle: Path, heldout_text: Path, target: str) -> None:
    assert _largest_difference(bundle, target, heldout_text.read_bytes()) < 1e-5
