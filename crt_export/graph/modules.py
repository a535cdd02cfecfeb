"""The exported functions: thin wrappers of a language model with the inputs and outputs of the contract.

No mathematics of a model lives here, only what a graph adds to it: dtypes at the border, padding, the choice of the
last real token, and which pass writes the caches. Lists of tensors are in the order of the model's declaration; caches
are key, value, key, value, ... Parity never imports this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crt_export.cache import AppendedCache, Cache
from crt_export.graph.operators import ScatteredCache
from crt_export.models.base import LanguageModel, Pass
from crt_export.models.declaration import HIDDEN


class HeadModule(nn.Module):
    """``head.onnx``: hidden float32 [batch, seq, hidden] -> logits float32 [batch, seq, vocab]."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden.to(self.model.residual_dtype)).float()


class StepModule(nn.Module):
    """``step.onnx``: one token; see graphs/step.toml for every tensor."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position: Tensor, states: list[Tensor], caches: list[Tensor]):
        cache = _scattered(self.model, caches, position, 1)
        done = self.model.run_pass(input_ids, _inner(self.model, states), position, cache)
        after = (done.states[spec.name].float() for spec in self.model.carried.states)
        return (*_token_outputs(self.model, done.hidden), position + 1, *after, *_interleave(cache))


class PassModule(nn.Module):
    """One pass over a chunk that writes the caches, and everything that the last pass of a prefill delivers.

    It is ``prefill_pass.onnx``, the last pass of ``prefill.onnx``, and all of it for a model that is not iterated.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        length: Tensor,
        position: Tensor,
        states: list[Tensor],
        iterates: list[Tensor],
        caches: list[Tensor],
    ):
        cache = _scattered(self.model, caches, position, input_ids.shape[1])
        start, before, done = _run(self.model, input_ids, position, states, iterates, cache)
        last = {
            name: _last_real(torch.cat([start[name], values], dim=1), length) for name, values in done.states.items()
        }
        hidden = last[HIDDEN] if HIDDEN in last else _last_real(done.hidden, (length - 1).clamp(min=0))
        residual = _residual([done.states[name].float() - before[name].float() for name in before], length)
        return (
            *_token_outputs(self.model, hidden),
            position + length,
            *(values.float() for values in last.values()),
            done.hidden.float(),
            *(values.float() for name, values in done.states.items() if name != HIDDEN and before),
            *residual,
            *_interleave(cache),
        )


class ReadingPassModule(nn.Module):
    """A pass before the last one: reads the caches, writes nothing, hands its iterates on."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, position: Tensor, states: list[Tensor], iterates: list[Tensor], caches: list[Tensor]
    ):
        specs, seq = self.model.carried.caches, input_ids.shape[1]
        cache = AppendedCache(specs, caches[0::2], caches[1::2], position, seq)
        _, _, done = _run(self.model, input_ids, position, states, iterates, cache)
        return tuple(done.states[spec.name].float() for spec in self.model.carried.states)


def _run(
    model: LanguageModel,
    input_ids: Tensor,
    position: Tensor,
    states: Sequence[Tensor],
    iterates: Sequence[Tensor],
    cache: Cache,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Pass]:
    """States before the chunk and iterates of the pass before, in the residual stream's dtype, and the pass."""
    start, before = _inner(model, states), _inner(model, iterates)
    return start, before, model.run_pass(input_ids, model.before(start, before), position, cache)


def _inner(model: LanguageModel, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """States by name, in the dtype of the residual stream; none where a model has no such tensors."""
    return {
        spec.name: tensor.to(model.residual_dtype) for spec, tensor in zip(model.carried.states, tensors, strict=False)
    }


def _scattered(model: LanguageModel, caches: list[Tensor], position: Tensor, seq: int) -> ScatteredCache:
    return ScatteredCache(model.carried.caches, caches[0::2], caches[1::2], position, seq)


def _last_real(values: Tensor, index: Tensor) -> Tensor:
    """Row b of ``values`` [batch, n, *shape] at ``index[b]``, kept as [batch, 1, *shape]."""
    index = index.view(-1, *(1,) * (values.ndim - 1))
    return values.gather(1, index.expand(-1, 1, *values.shape[2:]))


def _token_outputs(model: LanguageModel, last: Tensor) -> tuple[Tensor, Tensor]:
    """Logits float32 [batch, vocab] of ``last`` [batch, 1, hidden] and their argmax, int64 [batch, 1]."""
    logits = model.head(last).float().squeeze(1)
    return logits, logits.argmax(dim=-1, keepdim=True)


def _residual(changes: Sequence[Tensor], length: Tensor) -> tuple[Tensor, ...]:
    """Largest |change| [batch, seq, *shape] over the first ``length`` tokens, float32 [batch]; none without changes.

    A maximum drops NaN in several runtimes and a sum does not, so the sum stands in when it is NaN.
    """
    found = [_residual_of_one(change, length) for change in changes]
    if len(found) < 2:
        return tuple(found)
    total, largest = torch.stack(found).sum(0), torch.stack(found).amax(0)
    return (torch.where(torch.isnan(total), total, largest),)


def _residual_of_one(change: Tensor, length: Tensor) -> Tensor:
    change = change.flatten(2)
    real = torch.arange(change.shape[1], device=change.device) < length[:, None]
    size = torch.where(real[:, :, None], change.abs(), 0.0)
    total = size.sum(dim=(1, 2))
    return torch.where(torch.isnan(total), total, size.amax(dim=(1, 2)))


def _interleave(cache: ScatteredCache) -> tuple[Tensor, ...]:
    return tuple(tensor for pair in zip(cache.keys, cache.values, strict=True) for tensor in pair)
