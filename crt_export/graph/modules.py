"""The exported functions: thin wrappers of :class:`crt_export.model.Model` with the inputs and outputs of the contract.

No mathematics of the model lives here, only what a graph adds to it: dtypes at the border, padding, the choice of the
last real token, and which pass writes the cache. Parity never imports this file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crt_export.cache import AppendedCache
from crt_export.graph.operators import ScatteredCache
from crt_export.model import Model, shift


class HeadModule(nn.Module):
    """``head.onnx``: hidden float32 [batch, seq, hidden] -> logits float32 [batch, seq, vocab]."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden.to(self.model.residual_dtype)).float()


class StepModule(nn.Module):
    """``step.onnx``: one token; see graphs/step.toml for every tensor. ``caches`` is key, value, key, value, ..."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position: Tensor, state: Tensor, caches: list[Tensor]):
        cache = _scattered(self.model, caches, position, 1)
        h = self.model.run_pass(input_ids, state.to(self.model.residual_dtype), position, cache)
        return (*_token_outputs(self.model, h), position + 1, h.float(), *_interleave(cache))


class PlainStepModule(nn.Module):
    """``step.onnx`` of a plain transformer: no state."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position: Tensor, caches: list[Tensor]):
        cache = _scattered(self.model, caches, position, 1)
        h = self.model.run_pass(input_ids, None, position, cache)
        return (*_token_outputs(self.model, h), position + 1, *_interleave(cache))


class PrefillPassModule(nn.Module):
    """``prefill_pass.onnx``: one pass that writes the cache, and everything the last pass of a prefill delivers."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, length: Tensor, position: Tensor, state: Tensor, hidden: Tensor, caches: list[Tensor]
    ):
        cache = _scattered(self.model, caches, position, input_ids.shape[1])
        state, before = state.to(self.model.residual_dtype), hidden.to(self.model.residual_dtype)
        h = self.model.run_pass(input_ids, shift(state, before), position, cache)
        last = _last_real(torch.cat([state, h], dim=1), length)
        residual = _residual(h.float() - before.float(), length)
        outputs = (*_token_outputs(self.model, last), position + length, last.float(), h.float(), residual)
        return (*outputs, *_interleave(cache))


class ReadingPassModule(nn.Module):
    """A pass before the last one: reads the cache, writes nothing, hands its h [batch, seq, hidden] on."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position: Tensor, state: Tensor, hidden: Tensor, caches: list[Tensor]):
        seq, window = input_ids.shape[1], self.model.config.sliding_window
        cache = AppendedCache(caches[0::2], caches[1::2], position, seq, window)
        state, before = state.to(self.model.residual_dtype), hidden.to(self.model.residual_dtype)
        return self.model.run_pass(input_ids, shift(state, before), position, cache).float()


class PlainPrefillModule(nn.Module):
    """``prefill.onnx`` of a plain transformer: one pass is exact, so no state, iterate or residual."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, length: Tensor, position: Tensor, caches: list[Tensor]):
        cache = _scattered(self.model, caches, position, input_ids.shape[1])
        h = self.model.run_pass(input_ids, None, position, cache)
        last = _last_real(h, (length - 1).clamp(min=0))
        return (*_token_outputs(self.model, last), position + length, h.float(), *_interleave(cache))


def _scattered(model: Model, caches: list[Tensor], position: Tensor, seq: int) -> ScatteredCache:
    return ScatteredCache(caches[0::2], caches[1::2], position, seq, model.config.sliding_window)


def _last_real(h: Tensor, index: Tensor) -> Tensor:
    """Row b of ``h`` [batch, n, hidden] at ``index[b]``, kept as [batch, 1, hidden]."""
    return h.gather(1, index[:, None, None].expand(-1, 1, h.shape[2]))


def _token_outputs(model: Model, last: Tensor) -> tuple[Tensor, Tensor]:
    """Logits float32 [batch, vocab] of ``last`` [batch, 1, hidden] and their argmax, int64 [batch, 1]."""
    logits = model.head(last).float().squeeze(1)
    return logits, logits.argmax(dim=-1, keepdim=True)


def _residual(change: Tensor, length: Tensor) -> Tensor:
    """Largest |change| [batch, seq, hidden] over the first ``length`` tokens, float32 [batch].

    A maximum drops NaN in several runtimes and a sum does not, so the sum stands in when it is NaN.
    """
    real = torch.arange(change.shape[1], device=change.device) < length[:, None]
    size = torch.where(real[:, :, None], change.abs(), 0.0)
    total = size.sum(dim=(1, 2))
    return torch.where(torch.isnan(total), total, size.amax(dim=(1, 2)))


def _interleave(cache: ScatteredCache) -> tuple[Tensor, ...]:
    return tuple(tensor for pair in zip(cache.keys, cache.values, strict=True) for tensor in pair)
