"""Turning cached keys back: the arithmetic alone, against keys rotated for the smaller position."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crt_export.rotary import frequencies_from_base, rope_tables, rotate
from crt_export.runtime.slide import Window

THETA = 10000.0


def window(layout: str, head_dim: int = 8, size: int = 6) -> Window:
    return Window(size=size, head_dim=head_dim, rope_theta=THETA, rope_layout=layout)


def rotated(keys: torch.Tensor, positions: range, layout: str) -> np.ndarray:
    """Keys [heads, seq, head_dim] as the model rotates them for these positions."""
    cos, sin = rope_tables(512, frequencies_from_base(THETA, keys.shape[-1]))
    index = torch.tensor(positions)
    return rotate(keys[None], (cos[index][None, None], sin[index][None, None]), layout)[0].numpy()


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("float16", 2e-3)])
@pytest.mark.parametrize("shift", [1, 7, 400])
def test_keys_turned_back_are_the_keys_of_the_smaller_position(
    layout: str, dtype: str, atol: float, shift: int
) -> None:
    keys = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    cached = rotated(keys, range(shift, shift + 5), layout).astype(dtype)
    turned = window(layout).turn_back(cached, shift)
    assert turned.dtype == np.float64  # evict() rounds once, when it stores them
    np.testing.assert_allclose(turned, rotated(keys, range(5), layout), rtol=0, atol=atol)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_turning_by_nothing_changes_nothing_and_padding_is_left_alone(layout: str) -> None:
    padded = np.random.default_rng(0).normal(size=(2, 3, 10)).astype(np.float32)
    np.testing.assert_array_equal(window(layout).turn_back(padded, 0), padded)
    turned = window(layout).turn_back(padded, 3)
    np.testing.assert_array_equal(turned[..., 8:], padded[..., 8:])
    assert (turned[..., :8] != padded[..., :8]).all()


def test_many_evictions_do_not_wear_the_keys_out() -> None:
    """A key is turned back at most once per eviction it survives; the error of ten stays at rounding."""
    keys = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0))
    cached = rotated(keys, range(50, 51), "interleaved")
    for _ in range(10):
        cached = window("interleaved").turn_back(cached, 5)
    np.testing.assert_allclose(cached, rotated(keys, range(1), "interleaved"), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("position", "kept"), [(0, 0), (3, 3), (5, 5), (8, 5)])
def test_an_eviction_keeps_what_a_further_token_sees(position: int, kept: int) -> None:
    row = np.zeros((2, 9, 8), np.float32)
    row[:, :position] = np.arange(1, position + 1)[:, None]
    moved = window("half").evict(row, position, keys=False)
    assert window("half").kept(position) == kept
    assert moved[0, :kept, 0].tolist() == list(range(position - kept + 1, position + 1))
    assert not moved[:, kept:].any()
    turned = window("half").evict(row, position, keys=True)
    exact = window("half").turn_back(moved[:, :kept], position - kept)
    np.testing.assert_array_equal(turned[:, :kept], exact.astype(np.float32))


def test_a_window_of_one_keeps_nothing() -> None:
    assert not window("half", size=1).evict(np.ones((1, 4, 8), np.float32), 4, keys=True).any()


def endured(size: int, capacity: int, schedule: list[int], theta: float = THETA) -> float:
    """Relative error of float16 keys as they leave the window, after evictions with these shifts in turn."""
    keys = np.random.default_rng(0).normal(size=(8, 1, 64)).astype(np.float16)
    attention = Window(size=size, head_dim=64, rope_theta=theta, rope_layout="half")
    cache, index, moved = np.zeros((8, capacity, 64), np.float16), size - 2 + schedule[0], 0
    cache[:, index : index + 1] = keys
    for turn in range(size):
        shift = schedule[turn % len(schedule)]
        if index < shift:
            break
        cache = attention.evict(cache, size - 1 + shift, keys=True)
        index, moved = index - shift, moved + shift
    exact = attention.turn_back(keys, moved)
    return float(np.linalg.norm(cache[:, index : index + 1] - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("size", [16, 64, 512, 1024])
@pytest.mark.parametrize("theta", [500.0, 10000.0, 1e6])
def test_a_float16_key_stays_within_a_thousandth_at_the_least_capacity(size: int, theta: float) -> None:
    attention = Window(size=size, head_dim=64, rope_theta=theta, rope_layout="half")
    capacity = attention.least_capacity("float16")
    assert capacity >= size * 9 / 8
    assert endured(size, capacity, [capacity - (size - 1)], theta) < 1e-3
    assert attention.least_capacity("float32") == size


@pytest.mark.parametrize(
    ("capacity", "smallest_shift", "mean", "worst"),
    [(9 / 8, 1, 7e-4, 1.3e-3), (9 / 8, 1 / 2, 1e-3, 2e-3), (3 / 2, 1, 3e-4, 5e-4), (3 / 2, 1 / 2, 5e-4, 1e-3)],
)
@pytest.mark.parametrize(("size", "head_dim"), [(512, 32), (512, 64), (1024, 128)])
def test_single_float16_keys(
    size: int, head_dim: int, capacity: float, smallest_shift: float, mean: float, worst: float
) -> None:
    """What caches.py says of them: token by token a row moves by all its room; chunks can make it half of that."""
    attention = Window(size=size, head_dim=head_dim, rope_theta=10000.0, rope_layout="half")
    shift = math.ceil((size * capacity - (size - 1)) * smallest_shift)
    keys = np.random.default_rng(0).normal(size=(1000, head_dim)).astype(np.float16)
    cached, slides = keys, (size - 1) // shift
    for _ in range(slides):
        cached = attention.turn_back(cached, shift).astype(np.float16)
    exact = attention.turn_back(keys, shift * slides)
    errors = np.linalg.norm(cached - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert errors.mean() < mean
    assert errors.max() < worst


def test_at_a_capacity_of_the_window_it_would_not() -> None:
    assert endured(256, 256, [1]) > 5e-3


def test_turning_again_and_again_loses_nothing() -> None:
    keys = np.random.default_rng(0).normal(size=(2, 1, 8)).astype(np.float16)
    turned = keys
    for _ in range(511):
        turned = window("half").turn_back(turned, 1)
    np.testing.assert_allclose(turned, window("half").turn_back(keys, 511), rtol=0, atol=1e-12)
