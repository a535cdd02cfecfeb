"""Trace of PyTorch FP32 along some text, step by step; computed once and shared by every target of a run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from crt_export.model import Carry, Model
from crt_export.parity.reference import Reference


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """The reference along texts of one length, fed one token at a time.

    A slot of a cache is written once, so the caches at the end hold what every step wrote.

    Attributes:
        ids: What was fed, int64 [texts, steps].
        start: Tokens that went through parallel passes before the first step; 0 where all were stepped.
        hidden: h after every token, float32 [texts, steps, hidden].
        keys: Per layer, rotated keys, float32 [texts, heads, steps, head_dim].
        values: Likewise the values.
    """

    ids: np.ndarray
    start: int
    hidden: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuation:
    """The reference fed with its own most likely tokens.

    Attributes:
        tokens: The new tokens, int64 [prompts, new tokens].
        hidden: h that each of them was chosen from, float32 [prompts, new tokens, hidden].
        spread: Standard deviation of the logits that each was chosen from, float64 [prompts, new tokens].
    """

    tokens: np.ndarray
    hidden: Tensor
    spread: np.ndarray


_KEPT: WeakKeyDictionary[Reference, dict[Hashable, Any]] = WeakKeyDictionary()


def trace_tokens(reference: Reference, ids: np.ndarray, *, start: int = 0, passes: int = 1) -> Trace:
    """Feed tokens to the exact recurrence.

    Args:
        reference: Its model runs, and its life is that of the result.
        ids: int64 [texts, steps].
        start: How many of them go through parallel passes first.
        passes: Number K of those passes.
    """
    key = ("trace", ids.tobytes(), ids.shape, start, passes if start else 0)
    return computed_once(reference, key, lambda: _trace(reference.model, ids, start, passes))


def continue_greedily(reference: Reference, prompts: np.ndarray, new_tokens: int) -> Continuation:
    """Feed prompts, then the most likely token of every step.

    Args:
        reference: Its model runs, and its life is that of the result.
        prompts: int64 [prompts, tokens].
        new_tokens: How many tokens to choose; all but the last are fed.
    """
    key = ("continuation", prompts.tobytes(), prompts.shape, new_tokens)
    return computed_once(reference, key, lambda: _continue(reference.model, prompts, new_tokens))


def computed_once(reference: Reference, key: Hashable, compute: Callable[[], Any]) -> Any:
    """What ``compute`` gave for this reference and key before, or gives now; read only, it lives with the reference."""
    kept = _KEPT.setdefault(reference, {})
    if key not in kept:
        kept[key] = compute()
    return kept[key]


@torch.no_grad()
def _trace(model: Model, ids: np.ndarray, start: int, passes: int) -> Trace:
    tokens, carry, parts = torch.from_numpy(ids), None, []
    if start:
        first, carry, _ = model.unroll(tokens[:, :start], passes)
        parts.append(first)
    stepped, carry = model.sequential(tokens[:, start:], carry)
    parts.append(stepped)
    return Trace(ids=ids, start=start, hidden=torch.cat(parts, dim=1), keys=carry.keys, values=carry.values)


@torch.no_grad()
def _continue(model: Model, prompts: np.ndarray, new_tokens: int) -> Continuation:
    fed, carry = torch.from_numpy(prompts), None
    tokens, states, spread = [], [], []
    for _ in range(new_tokens):
        h, carry = _last(model, fed, carry)
        logits = model.head(h)
        fed = logits.argmax(dim=-1)
        states.append(h)
        tokens.append(fed)
        spread.append(logits.double().std(dim=-1, correction=0))
    return Continuation(
        tokens=torch.cat(tokens, dim=1).numpy(),
        hidden=torch.cat(states, dim=1),
        spread=torch.cat(spread, dim=1).numpy(),
    )


def _last(model: Model, ids: Tensor, carry: Carry | None) -> tuple[Tensor, Carry]:
    """h of the last token, [prompts, 1, hidden], and the carry after it."""
    h, after = model.sequential(ids, carry)
    return h[:, -1:], after
