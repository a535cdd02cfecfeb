"""The reference model against the equations, written a second time here in NumPy, and their invariants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import InputError, UnsupportedError
from crt_export.models.base import LanguageModel, State
from crt_export.models.registry import model_from_checkpoint, tensors_from_model

Tensors = dict[str, torch.Tensor]
PROPERTY = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    heads, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([2, 6, 10, 16, 70]))
    recurrent = draw(st.booleans() | st.just(True))
    return {
        "model_type": "context_ready_transformer" if recurrent else "transformer",
        "vocab_size": draw(st.integers(2, 40)),
        "hidden_size": heads * head_dim,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 40)),
        "correction_intermediate_size": draw(st.integers(1, 40)),
        "max_position_embeddings": 24,
        "rope_theta": draw(st.sampled_from([100.0, 10000.0])),
        "rope_layout": draw(st.sampled_from(["interleaved", "half"])),
        "tie_word_embeddings": draw(st.booleans()),
        "sliding_window": draw(st.none() | st.integers(1, 6)),
        "tokenizer": "none",
    }


@pytest.fixture(scope="session")
def built(
    tiny_config: Callable[..., ModelConfig], random_tensors: Callable[..., Tensors]
) -> Callable[..., LanguageModel]:
    """``built(seed, dtype, tensors=None, **changes)``: a model without a folder behind it."""

    def build(
        seed: int = 0, dtype: torch.dtype = torch.float64, tensors: Tensors | None = None, **changes: Any
    ) -> LanguageModel:
        config = tiny_config(**changes)
        return model_from_checkpoint(_checkpoint(config, tensors or random_tensors(config, seed)), dtype)

    return build


def _checkpoint(config: Any, tensors: Tensors) -> Checkpoint:
    return Checkpoint(path=Path("in-memory"), config=config, tensors=tensors, stored_dtypes=("F32",), sha256="")


def assert_exact(found: object, expected: object) -> None:
    """Float64 on both sides: only the order of additions may differ."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def _ids(model: LanguageModel, seq: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, seq), generator=generator)


# --- the oracle
def _layer_norm(x: np.ndarray, w: dict[str, np.ndarray], name: str, eps: float) -> np.ndarray:
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)


def _ffn(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    inner = _linear(x, w, f"{name}.up")
    gelu = np.array([0.5 * u * (1 + math.erf(u / math.sqrt(2))) for u in inner])
    return _linear(gelu, w, f"{name}.down")


def _rotated(head: np.ndarray, position: int, config: Any) -> np.ndarray:
    half, out = config.head_dim // 2, head.copy()
    for j in range(half):
        first, second = (2 * j, 2 * j + 1) if config.rope_layout == "interleaved" else (j, j + half)
        angle = position * config.rope_theta ** (-2 * j / config.head_dim)
        pair = complex(head[first], head[second]) * complex(math.cos(angle), math.sin(angle))
        out[first], out[second] = pair.real, pair.imag
    return out


def oracle(
    config: Any, tensors: Tensors, ids: list[int], previous: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """h and logits of one sequence, float64, token by token.

    Without ``previous`` it is the recurrence; with it, [seq, hidden], it is one pass of the unrolled model, where
    position t sees ``previous[t - 1]`` instead of its own predecessor.
    """
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    eps, heads = config.norm_eps, config.num_attention_heads
    keys: list[list[np.ndarray]] = [[] for _ in range(config.num_hidden_layers)]
    values: list[list[np.ndarray]] = [[] for _ in range(config.num_hidden_layers)]
    states: list[np.ndarray] = []
    logits: list[np.ndarray] = []
    for t, token in enumerate(ids):
        x = w["embed.weight"][token]
        z = x
        if config.carried.iterated:
            before = np.zeros_like(x) if t == 0 else (states if previous is None else previous)[t - 1]
            z = x + _ffn(_layer_norm(before + x, w, "correction.norm", eps), w, "correction")
        for i in range(config.num_hidden_layers):
            layer = f"layers.{i}"
            y = _layer_norm(z, w, f"{layer}.attn_norm", eps)
            q, k, v = (_linear(y, w, f"{layer}.attn.{p}").reshape(heads, -1) for p in "qkv")
            keys[i].append(np.stack([_rotated(head, t, config) for head in k]))
            values[i].append(v)
            first = max(0, t + 1 - (config.sliding_window or t + 1))
            mixed = []
            for n in range(heads):
                query = _rotated(q[n], t, config)
                scores = np.array([query @ key[n] for key in keys[i][first:]]) / math.sqrt(config.head_dim)
                weights = np.exp(scores - scores.max())
                mixed.append(weights / weights.sum() @ np.stack([value[n] for value in values[i][first:]]))
            a = z + _linear(np.concatenate(mixed), w, f"{layer}.attn.o")
            z = a + _ffn(_layer_norm(a, w, f"{layer}.mlp_norm", eps), w, f"{layer}.mlp")
        states.append(z)
        final = _layer_norm(z, w, "final_norm", eps)
        logits.append(w["embed.weight"] @ final if config.tie_word_embeddings else _linear(final, w, "lm_head"))
    return np.stack(states), np.stack(logits)


# --- equations
@PROPERTY
@given(changes=architectures(), seed=st.integers(0, 99))
def test_sequential_agrees_with_the_equations(built, random_tensors, changes, seed) -> None:
    model = built(seed, torch.float32, **changes)
    ids = _ids(model, 7, seed=seed)
    states, logits = oracle(model.config, random_tensors(model.config, seed), ids[0].tolist())
    h = model.sequential(ids)[0].hidden
    np.testing.assert_allclose(h[0], states, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(model.head(h)[0], logits, rtol=1e-4, atol=5e-5)


@PROPERTY
@given(changes=architectures(), seed=st.integers(0, 99), passes=st.integers(1, 4))
def test_unroll_agrees_with_the_equations(built, random_tensors, changes, seed, passes) -> None:
    model = built(seed, torch.float32, **changes)
    ids = _ids(model, 6, seed=seed)
    before = states = np.zeros((6, model.config.hidden_size))
    for _ in range(passes):
        before = states
        states, _ = oracle(model.config, random_tensors(model.config, seed), ids[0].tolist(), previous=states)
    done, _, change = model.unroll(ids, passes)
    h = done.hidden
    np.testing.assert_allclose(h[0], states, rtol=1e-4, atol=2e-5)
    largest = np.abs(states - before).max() if model.carried.iterated else 0.0
    np.testing.assert_allclose(change[0], largest, rtol=1e-3, atol=5e-5)


def test_position_zero_is_corrected_too(built) -> None:
    model = built()
    with_correction = model.unroll(_ids(model, 1), 1)[0].hidden
    tensors = tensors_from_model(model)
    tensors["correction.down.bias"] = tensors["correction.down.bias"] + 1
    assert not torch.allclose(with_correction, built(tensors=tensors).unroll(_ids(model, 1), 1)[0].hidden)


# --- invariants
@PROPERTY
@given(changes=architectures(), seed=st.integers(0, 99), seq=st.integers(1, 9), passes=st.integers(1, 10))
def test_first_k_positions_are_exact_after_k_passes(built, changes, seed, seq, passes) -> None:
    model = built(seed, **changes)
    ids = _ids(model, seq, batch=2, seed=seed)
    h = model.unroll(ids, passes)[0].hidden
    assert_exact(h[:, :passes], model.sequential(ids)[0].hidden[:, :passes])


def test_positions_beyond_k_are_not_exact(built) -> None:
    model = built()
    ids = _ids(model, 9)
    error = (model.unroll(ids, 3)[0].hidden - model.sequential(ids)[0].hidden).abs().amax(dim=-1)[0]
    assert error[:3].max() < 1e-10
    assert error[3:].min() > 1e-4


@PROPERTY
@given(changes=architectures(), seed=st.integers(0, 99), seq=st.integers(1, 9), spare=st.integers(0, 3))
def test_enough_passes_equal_the_recurrence_and_its_state(built, changes, seed, seq, spare) -> None:
    model = built(seed, **changes)
    ids = _ids(model, seq, batch=2, seed=seed)
    h, state, _ = model.unroll(ids, seq + spare)
    expected, expected_state = model.sequential(ids)
    assert_exact(h, expected)
    _assert_same_state(state, expected_state)


def _assert_same_state(found: State, expected: State) -> None:
    assert_exact(dict(found.states), dict(expected.states))
    assert_exact(found.keys, expected.keys)
    assert_exact(found.values, expected.values)
    assert torch.equal(found.position, expected.position)


@PROPERTY
@given(
    changes=architectures(),
    seed=st.integers(0, 99),
    chunks=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    spare=st.integers(0, 2),
)
def test_chunks_with_enough_passes_equal_the_whole(built, changes, seed, chunks, spare) -> None:
    model = built(seed, **changes)
    ids = _ids(model, sum(chunks), batch=2, seed=seed)
    expected, expected_state = model.sequential(ids)
    state, parts = None, []
    for chunk in ids.split(chunks, dim=1):
        h, state, _ = model.unroll(chunk, chunk.shape[1] + spare, state)
        parts.append(h.hidden)
    assert state is not None
    assert_exact(torch.cat(parts, dim=1), expected.hidden)
    _assert_same_state(state, expected_state)


def test_chunks_with_too_few_passes_differ_from_the_whole(built) -> None:
    model = built()
    ids = _ids(model, 12)
    whole = model.unroll(ids, 2)[0].hidden
    first, state, _ = model.unroll(ids[:, :6], 2)
    second, _, _ = model.unroll(ids[:, 6:], 2, state)
    assert (torch.cat([first.hidden, second.hidden], dim=1) - whole).abs().max() > 1e-4


@PROPERTY
@given(changes=architectures(), seed=st.integers(0, 99), passes=st.integers(1, 5))
def test_zero_correction_is_the_plain_transformer(built, random_tensors, tiny_config, changes, seed, passes) -> None:
    changes = {**changes, "model_type": "context_ready_transformer"}
    tensors = random_tensors(tiny_config(**changes), seed)
    for name in ("correction.down.weight", "correction.down.bias"):
        tensors[name] = torch.zeros_like(tensors[name])
    recurrent = built(tensors=tensors, **changes)
    plain = built(
        tensors={name: tensor for name, tensor in tensors.items() if not name.startswith("correction.")},
        **{**changes, "model_type": "transformer"},
    )
    ids = _ids(plain, 8, batch=2, seed=seed)
    assert_exact(recurrent.unroll(ids, passes)[0].hidden, plain.unroll(ids, 1)[0].hidden)
    assert_exact(recurrent.sequential(ids)[0].hidden, plain.unroll(ids, 1)[0].hidden)


@PROPERTY
@given(changes=architectures(), seed=st.integers(0, 99))
def test_one_pass_over_one_token_is_the_step(built, changes, seed) -> None:
    model = built(seed, **changes)
    ids = _ids(model, 6, batch=2, seed=seed)
    expected, expected_state = model.sequential(ids)
    by_step, by_pass = model.start(2), model.start(2)
    for t in range(6):
        token = ids[:, t : t + 1]
        stepped, by_step = model.step(token, by_step)
        passed, by_pass, _ = model.unroll(token, 1, by_pass)
        assert_exact(stepped, expected.hidden[:, t : t + 1])
        assert_exact(passed.hidden, expected.hidden[:, t : t + 1])
    _assert_same_state(by_step, expected_state)


@PROPERTY
@given(changes=architectures(), seed=st.integers(0, 99), first=st.integers(1, 3), second=st.integers(1, 3))
def test_passes_can_continue_from_an_iterate(built, changes, seed, first, second) -> None:
    model = built(seed, **changes)
    ids = _ids(model, 8, seed=seed)
    middle, _, _ = model.unroll(ids, first)
    continued, state, change = model.unroll(ids, second, iterate=middle.states)
    whole, expected_state, expected_change = model.unroll(ids, first + second)
    assert_exact(continued, whole)
    assert_exact(change, expected_change)
    _assert_same_state(state, expected_state)


@PROPERTY
@given(changes=architectures(), seed=st.integers(0, 99))
def test_cache_entries_beyond_the_position_are_not_seen(built, changes, seed) -> None:
    model = built(seed, **changes)
    ids = _ids(model, 8, seed=seed)
    _, state, _ = model.unroll(ids[:, :4], 4)
    padded = dataclasses.replace(
        state,
        keys=tuple(torch.cat([key, torch.full_like(key, 1e3)], dim=2) for key in state.keys),
        values=tuple(torch.cat([value, torch.full_like(value, 1e3)], dim=2) for value in state.values),
    )
    expected = model.unroll(ids[:, 4:], 2, state)[0].hidden
    assert_exact(model.unroll(ids[:, 4:], 2, padded)[0].hidden, expected)


# --- loading
@pytest.mark.parametrize("passes", [0, -1])
def test_less_than_one_pass_is_refused(built, passes) -> None:
    model = built()
    with pytest.raises(InputError, match=f"K must be at least 1, found {passes}"):
        model.unroll(_ids(model, 3), passes)


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_survive_the_way_into_a_model_and_back(built, random_tensors, tied) -> None:
    model = built(3, torch.float32, tie_word_embeddings=tied)
    expected = random_tensors(model.config, 3)
    found = tensors_from_model(model)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("dtype", "fits"), [(torch.float16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_weights_beyond_a_dtype_are_refused_by_name(tiny_config, random_tensors, dtype, fits) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    tensors["lm_head.weight"][0, 0] = 70000.0
    tensors["layers.1.mlp.down.bias"][0] = -1e6
    checkpoint = _checkpoint(config, tensors)
    if fits:
        assert model_from_checkpoint(checkpoint, dtype).lm_head.weight.dtype == dtype
        return
    with pytest.raises(UnsupportedError, match="2 problems") as caught:
        model_from_checkpoint(checkpoint, dtype)
    assert "lm_head.weight: largest |weight| 70000" in str(caught.value)
    assert "layers.1.mlp.down.bias: largest |weight| 1e+06" in str(caught.value)


@pytest.mark.parametrize("residual", [torch.float16, torch.float32])
def test_half_precision_keeps_the_residual_stream_in_its_own_dtype(tiny_config, random_tensors, residual) -> None:
    config = tiny_config()
    checkpoint = _checkpoint(config, random_tensors(config))
    half = model_from_checkpoint(checkpoint, torch.float16, residual)
    full = model_from_checkpoint(checkpoint)
    ids = _ids(full, 10)
    done, state = half.sequential(ids)
    assert (done.hidden.dtype, state.states["hidden"].dtype) == (residual, residual)
    assert state.keys[0].dtype == torch.float16
    torch.testing.assert_close(done.hidden.float(), full.sequential(ids)[0].hidden, rtol=0.02, atol=0.02)
