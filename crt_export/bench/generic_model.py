"""Any model for decoding in plain PyTorch: its own equations over caches that are allocated once.

What :mod:`crt_export.bench.static_model` is for one shape, for all others: the model of :mod:`crt_export.models`, its
linears as ``nn.Linear`` (so that they can be quantised) over weights that stay [in, out], and no copy of a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from crt_export.bench.static_model import zeroed_caches
from crt_export.cache import Attended
from crt_export.config import ModelConfig
from crt_export.models.declaration import CacheSpec
from crt_export.models.layers import Linear
from crt_export.models.registry import model_class, state_dict_from_tensors

States = Mapping[str, Tensor]
#: logits [batch, vocab], the likeliest token int64 [batch, 1], the states [batch, 1, *shape] by name.
Result = tuple[Tensor, Tensor, States]


class GenericModel(nn.Module):
    """A model for inference, float32; the calls are those of :class:`crt_export.bench.static_model.StaticModel`."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of a checkpoint, linears as [out, in]."""
        super().__init__()
        with torch.device("meta"):
            model = model_class(config.model_type)(config)
        model.load_state_dict(state_dict_from_tensors(config, tensors), assign=True)
        model.reset_tables()
        _replace_linears(model, {})
        self.config, self.model = config, model
        self.eval().requires_grad_(False)

    def caches(self, batch: int, capacity: int) -> tuple[Tensor, ...]:
        """Zeroed caches, see :func:`crt_export.bench.static_model.zeroed_caches`."""
        return zeroed_caches(self.config, batch, capacity)

    def start(self, batch: int) -> States:
        """The states before the first token."""
        return self.model.start(batch).states

    def step(self, ids: Tensor, states: States, caches: Sequence[Tensor], position: int) -> Result:
        """One token per row at a position, int64 [batch, 1]; the caches are written in place."""
        cache = _PlacedCache(self.config.carried.caches, caches, slice(position, position + 1), position + 1)
        return self._run(ids, states, torch.full((ids.shape[0],), position), cache)

    def step_padded(self, ids: Tensor, states: States, caches: Sequence[Tensor], position: Tensor, end: int) -> Result:
        """As step(), at a position that is int64 [1], in the form that torch.compile can keep."""
        cache = _PlacedCache(self.config.carried.caches, caches, position, end)
        return self._run(ids, states, position.expand(ids.shape[0]), cache)

    def prefill(self, ids: Tensor, caches: Sequence[Tensor], passes: int) -> Result:
        """A prompt from an empty cache, int64 [batch, seq], in this many parallel passes; returns as step()."""
        done, after, _ = self.model.unroll(ids, passes)
        for cache, keys, values in zip(caches, after.keys, after.values, strict=True):
            cache[0, :, :, : ids.shape[1]], cache[1, :, :, : ids.shape[1]] = keys, values
        return self._result(done.hidden[:, -1:], after.states)

    def _run(self, ids: Tensor, states: States, position: Tensor, cache: _PlacedCache) -> Result:
        done = self.model.run_pass(ids, states, position, cache)
        return self._result(done.hidden, done.states)

    def _result(self, hidden: Tensor, states: States) -> Result:
        logits = self.model.head(hidden)[:, -1]
        return logits, logits.argmax(-1, keepdim=True), states


class _PlacedCache:
    """Writes one token's keys and values where they belong, in place.

    Args:
        specs: What the caches are.
        caches: Each [2, batch, heads, capacity, head_dim].
        place: Where the token goes: a slice, or its position as int64 [1], whose attention is masked.
        end: Entries that attention reads.
    """

    def __init__(self, specs: Sequence[CacheSpec], caches: Sequence[Tensor], place: slice | Tensor, end: int) -> None:
        self._specs, self._caches, self._place, self._end = specs, caches, place, end

    @property
    def keys(self) -> list[Tensor]:
        return [cache[0, :, :, : self._end] for cache in self._caches]

    @property
    def values(self) -> list[Tensor]:
        return [cache[1, :, :, : self._end] for cache in self._caches]

    def extend(self, index: int, keys: Tensor, values: Tensor) -> Attended:
        cache, window = self._caches[index], self._specs[index].window
        cache[0, :, :, self._place] = keys
        cache[1, :, :, self._place] = values
        begin = 0
        mask = None
        if isinstance(self._place, slice):
            begin = 0 if window is None else max(0, self._end - window)
        else:
            slot = torch.arange(self._end)
            seen = slot <= self._place
            mask = (seen if window is None else seen & (slot > self._place - window))[None, None, None]
        held = cache[:, :, :, begin : self._end]
        return Attended(held[0], held[1], mask)


def _replace_linears(module: nn.Module, made: dict[nn.Module, nn.Linear]) -> None:
    """Put an ``nn.Linear`` on the same memory in the place of every linear; one that is used twice stays one."""
    for name, child in list(module._modules.items()):
        if isinstance(child, Linear):
            if child not in made:
                made[child] = _linear(child)
            setattr(module, name, made[child])
        elif child is not None:
            _replace_linears(child, made)


def _linear(linear: Linear) -> nn.Linear:
    into, out = linear.weight.shape
    made = nn.Linear(into, out, bias=linear.bias is not None, device="meta")
    made.weight = nn.Parameter(linear.weight.detach().T)
    if linear.bias is not None:
        made.bias = linear.bias
    return made
