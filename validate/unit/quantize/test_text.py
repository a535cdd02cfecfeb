from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from crt_export.errors import InputError
from crt_export.quantize.text_evidence import check_is_text

WINDOWS, SEQ = 32, 64


def _windows(tokens: np.ndarray) -> np.ndarray:
    return np.resize(tokens[: WINDOWS * SEQ], (WINDOWS, SEQ)).astype(np.int64)


def test_bytes_of_text_are_text(text_tokens: np.ndarray) -> None:
    evidence = check_is_text(_windows(text_tokens), 256)
    assert evidence.tokens == WINDOWS * SEQ
    assert evidence.repetition > 5
    assert evidence.dependence > 0.2


@pytest.mark.parametrize("pattern", [rb"\w+|\W", rb"..?", rb"\w{1,3}|\W+"])
def test_larger_units_of_text_are_text(pattern: bytes, train_text: Path) -> None:
    units = re.findall(pattern, train_text.read_bytes()[:20000], re.DOTALL)
    index = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    check_is_text(_windows(np.array([index[unit] for unit in units])), 32000)


@pytest.mark.parametrize("vocab_size", [64, 256, 32000])
@pytest.mark.parametrize("seed", range(5))
def test_uniform_noise_is_refused_for_both_reasons(vocab_size: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, vocab_size, (WINDOWS, SEQ))
    with pytest.raises(InputError, match=r"(?s)look random.*tokens repeat.*a token tells"):
        check_is_text(noise, vocab_size)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_text_is_refused(seed: int, text_tokens: np.ndarray) -> None:
    shuffled = np.random.default_rng(seed).permutation(_windows(text_tokens).ravel()).reshape(WINDOWS, SEQ)
    with pytest.raises(InputError, match="a token tells"):
        check_is_text(shuffled, 256)


def test_noise_with_the_histogram_of_words_is_refused() -> None:
    noise = np.minimum(np.random.default_rng(0).zipf(1.3, (WINDOWS, SEQ)), 31999)
    with pytest.raises(InputError, match="a token tells"):
        check_is_text(noise, 32000)


def test_a_constant_and_a_counter_are_no_text() -> None:
    with pytest.raises(InputError, match="a token tells"):
        check_is_text(np.zeros((WINDOWS, SEQ), np.int64), 256)
    with pytest.raises(InputError, match="tokens repeat"):
        check_is_text(_windows(np.arange(WINDOWS * SEQ) % 256), 256)


def test_ids_out_of_range_and_wrong_shapes_are_named(text_tokens: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"\[0, 100\), found"):
        check_is_text(_windows(text_tokens), 100)
    with pytest.raises(InputError, match=r"integer tokens \[windows, seq\]"):
        check_is_text(text_tokens, 256)
    with pytest.raises(InputError, match="float64"):
        check_is_text(_windows(text_tokens).astype(np.float64), 256)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="found none"):
        check_is_text(np.zeros((0, SEQ), np.int64), 256)
