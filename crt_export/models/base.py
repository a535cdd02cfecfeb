"""Language model in PyTorch: what every architecture is, and what follows from its one pass.

An architecture declares what it carries (:class:`crt_export.models.declaration.Carried`) and computes one pass over a
chunk, all positions in parallel, and the head. Step, K passes, the exact recurrence and the start follow here. This is
what parity is measured against, what calibration observes and what the graphs are exported from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from crt_export.cache import AppendedCache, Cache, GrowingCache
from crt_export.config import ModelConfig
from crt_export.errors import InputError
from crt_export.models.declaration import Carried


class Pass(NamedTuple):
    """What one pass computes.

    Attributes:
        hidden: What the head reads, [batch, seq, hidden], in the dtype of the residual stream.
        states: State name to the state of every token, [batch, seq, *shape]; of the last one alone, [batch, 1, *shape],
            where states advance within the pass.
    """

    hidden: Tensor
    states: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class State:
    """What decoding continues from.

    Attributes:
        states: State name to the state after the last token, [batch, 1, *shape]; zeros before the first token.
        keys: Per cache, keys of all past tokens, rotated if the model does that, [batch, heads, past, head_dim].
        values: Likewise the values.
        position: Number of past tokens per row, int64 [batch]; all rows are equal in the reference.
    """

    states: Mapping[str, Tensor]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    position: Tensor


class LanguageModel(nn.Module, ABC):
    """A causal language model; all sequences of a batch have one length and one position.

    Attributes:
        config_class: Class of its configuration.
        config: Its configuration, an instance of that class.
        residual_dtype: Of the residual stream and of the states; None: that of the weights.
        final_norm: What the head begins with.
        lm_head: Its linear.
    """

    config_class: ClassVar[type[ModelConfig]]
    config: Any
    final_norm: Any
    lm_head: Any

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.residual_dtype: torch.dtype | None = None

    @abstractmethod
    def run_pass(self, ids: Tensor, before: Mapping[str, Tensor], position: Tensor, cache: Cache) -> Pass:
        """One pass over a chunk, all positions in parallel.

        Args:
            ids: Token ids, int64 [batch, seq].
            before: State name to the state of the token before each one, [batch, seq, *shape]; where states advance
                within the pass, that before the chunk, [batch, 1, *shape].
            position: Tokens already in the cache, int64 [batch].
            cache: Takes new keys and values of each cache and hands back what to attend over.
        """

    def head(self, hidden: Tensor) -> Tensor:
        """``logits = W_head N_f(h) + b_head``, [..., hidden] -> [..., vocab]."""
        return self.lm_head(self.final_norm(hidden))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def reset_tables(self) -> None:
        """Compute the buffers that no checkpoint stores."""

    @property
    def carried(self) -> Carried:
        """What the model carries from token to token."""
        return self.config.carried

    def unroll(
        self, ids: Tensor, passes: int, state: State | None = None, iterate: Mapping[str, Tensor] | None = None
    ) -> tuple[Pass, State, Tensor]:
        """K parallel passes: Jacobi iteration on the recurrence, each pass fed the states of the one before.

        Args:
            ids: Token ids, int64 [batch, seq].
            passes: K, at least 1. A model that is not iterated needs one and gains nothing from more.
            state: Where to continue from; None starts a sequence.
            iterate: State name to the first iterate, [batch, seq, *shape]; None is zeros.

        Returns:
            The last pass, the state after it, and per row the largest |change| of an iterate in it, [batch]; zeros
            where nothing is iterated.

        Raises:
            InputError: ``passes`` is below 1.
        """
        if passes < 1:
            raise InputError(f"number of passes K must be at least 1, found {passes}")
        start = self.start(ids.shape[0]) if state is None else state
        last = self._first_iterate(start, ids.shape[1]) if iterate is None else dict(iterate)
        done = Pass(hidden=start.position.new_zeros(0), states=last)
        cache = self._appended(start, ids.shape[1])
        for _ in range(passes):
            cache = self._appended(start, ids.shape[1])
            last, done = done.states, self.run_pass(ids, self.before(start.states, done.states), start.position, cache)
        after = State(
            states={name: values[:, -1:] for name, values in done.states.items()},
            keys=tuple(cache.keys),
            values=tuple(cache.values),
            position=start.position + ids.shape[1],
        )
        return done, after, self._change(done, last)

    def before(self, states: Mapping[str, Tensor], iterate: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a pass reads: the states shifted by one token, or those before the chunk where they advance inside it.

        Args:
            states: Before the chunk, [batch, 1, *shape].
            iterate: Of the pass before, [batch, seq, *shape].
        """
        if not self.carried.parallel:
            return dict(states)
        return {spec.name: shift(states[spec.name], iterate[spec.name]) for spec in self.carried.states}

    @torch.no_grad()
    def sequential(self, ids: Tensor, state: State | None = None) -> tuple[Pass, State]:
        """The exact recurrence, one token at a time.

        Args:
            ids: Token ids, int64 [batch, seq].
            state: Where to continue from; None starts a sequence.

        Returns:
            ``hidden`` [batch, seq, hidden] and the states after every token, and the state after the last.
        """
        start = self.start(ids.shape[0]) if state is None else state
        cache = GrowingCache(self.carried.caches, start.keys, start.values, ids.shape[1])
        states, position, passes = start.states, start.position, []
        for t in range(ids.shape[1]):
            passes.append(self.run_pass(ids[:, t : t + 1], states, position, cache))
            states, position = passes[-1].states, position + 1
            cache.advance()
        done = Pass(
            hidden=torch.cat([one.hidden for one in passes], 1),
            states={name: torch.cat([one.states[name] for one in passes], 1) for name in states},
        )
        return done, State(states=states, keys=tuple(cache.keys), values=tuple(cache.values), position=position)

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """One token of the recurrence, ids int64 [batch, 1]: the same function as one pass over a chunk of one."""
        done, after, _ = self.unroll(ids, 1, state)
        return done.hidden, after

    def start(self, batch: int) -> State:
        """The state before the first token: zeros, nothing cached."""
        weight = next(self.parameters())
        caches = tuple(weight.new_zeros(batch, spec.heads, 0, spec.head_dim) for spec in self.carried.caches)
        return State(
            states={
                spec.name: weight.new_zeros(batch, 1, *spec.shape, dtype=self.residual_dtype)
                for spec in self.carried.states
            },
            keys=caches,
            values=caches,
            position=torch.zeros(batch, dtype=torch.int64, device=weight.device),
        )

    def _first_iterate(self, start: State, seq: int) -> dict[str, Tensor]:
        return {
            name: values.new_zeros(values.shape[0], seq, *values.shape[2:]) for name, values in start.states.items()
        }

    def _appended(self, start: State, seq: int) -> AppendedCache:
        return AppendedCache(self.carried.caches, start.keys, start.values, start.position, seq)

    def _change(self, done: Pass, last: Mapping[str, Tensor]) -> Tensor:
        if not self.carried.iterated:
            return done.hidden.new_zeros(done.hidden.shape[0])
        changes = [(values - last[name]).abs().flatten(1).amax(1) for name, values in done.states.items()]
        return torch.stack(changes).amax(0)


def shift(state: Tensor, iterate: Tensor) -> Tensor:
    """``s_t = h_{t-1}``, ``s_0 = state``: [batch, 1, *shape] and [batch, seq, *shape] -> [batch, seq, *shape]."""
    return torch.cat([state, iterate], dim=1)[:, :-1]
