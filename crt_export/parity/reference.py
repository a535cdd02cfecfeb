"""PyTorch FP32 in every regime, from :mod:`crt_export.models` alone: what every exported graph is compared with.

Regimes are named for what the deployment runs: ``step`` is the exact recurrence, ``prefill`` is K parallel passes over
the whole window, ``handover`` is K passes over its first half and the recurrence from there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crt_export.models.base import LanguageModel
from crt_export.parity.windows import Windows

STEP = "step"
PREFILL = "prefill"
PREFILL_PASS = "prefill_pass"
HANDOVER = "handover"


def first_position(regime: str, length: int) -> int:
    """Index of the first prediction that the regime delivers for a window of this length."""
    return length // 2 - 1 if regime == HANDOVER else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """The reference along texts of one length, fed one token at a time.

    A slot of a cache is written once, so the caches at the end hold what every step wrote.

    Attributes:
        ids: What was fed, int64 [texts, steps].
        start: Tokens that went through parallel passes before the first step; 0 where all were stepped.
        hidden: What the head reads after every token, float32 [texts, steps, hidden].
        states: State name to the state after every token, float32 [texts, steps, *shape].
        keys: Per cache, keys, float32 [texts, heads, steps, head_dim].
        values: Likewise the values.
    """

    ids: np.ndarray
    start: int
    hidden: Tensor
    states: Mapping[str, Tensor]
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


class Reference:
    """What PyTorch FP32 gives, computed once for all targets; whatever it returns is to be read only.

    Of the windows only h is kept, [windows, positions, hidden]; logits are made from it in the pieces they are needed
    in.
    """

    def __init__(self, model: LanguageModel, windows: Windows, *, batch: int, steps: Tensor | None = None) -> None:
        """Take a model in evaluation mode.

        Args:
            model: Reference model, any dtype.
            windows: What to run it on.
            batch: Windows per call.
            steps: h of the recurrence over the windows, [windows, positions, hidden], where it is known already.
        """
        self.model, self.windows, self._batch = model, windows, batch
        self._hidden: dict[tuple[str, int], Tensor] = {} if steps is None else {(STEP, 0): steps}
        self._kept: dict[Hashable, Any] = {}

    def first_windows(self, count: int) -> Reference:
        """The reference on the first windows alone; what was computed for all of them is not computed again."""
        part = Reference(self.model, self.windows.part(windows=count), batch=self._batch)
        part._hidden = {key: hidden[:count] for key, hidden in self._hidden.items()}
        return part

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gave for this key before, or gives now; it lives as long as the reference."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def hidden(self, regime: str, passes: int) -> Tensor:
        """h of the scored positions, [windows, positions, hidden]; see :func:`first_position` for where they start."""
        regime = PREFILL if regime == PREFILL_PASS else regime
        key = (regime, 0 if regime == STEP else passes)
        if key not in self._hidden:
            self._hidden[key] = torch.cat([*self._regime(regime, passes)])
        return self._hidden[key]

    @torch.no_grad()
    def logits(self, regime: str, passes: int, windows: slice, positions: slice) -> Tensor:
        """Logits of some windows and positions, float32 [windows, positions, vocab]."""
        start = first_position(regime, self.windows.length)
        wanted = slice(positions.start - start, positions.stop - start)
        return self.model.head(self.hidden(regime, passes)[windows, wanted]).float()

    def trace(self, ids: np.ndarray, *, start: int = 0, passes: int = 1) -> Trace:
        """Feed tokens to the exact recurrence.

        Args:
            ids: int64 [texts, steps].
            start: How many of them go through parallel passes first.
            passes: Number K of those passes.
        """
        key = ("trace", ids.tobytes(), ids.shape, start, passes if start else 0)
        return self.once(key, lambda: self._trace(ids, start, passes))

    def continuation(self, prompts: np.ndarray, new_tokens: int) -> Continuation:
        """Feed prompts, then the most likely token of every step.

        Args:
            prompts: int64 [prompts, tokens].
            new_tokens: How many tokens to choose; all but the last are fed.
        """
        key = ("continuation", prompts.tobytes(), prompts.shape, new_tokens)
        return self.once(key, lambda: self._continuation(prompts, new_tokens))

    @torch.no_grad()
    def _regime(self, regime: str, passes: int) -> Iterator[Tensor]:
        ids = torch.from_numpy(self.windows.inputs)
        half = self.windows.length // 2
        for part in ids.split(self._batch):
            if regime == STEP:
                yield self.model.sequential(part)[0].hidden
            elif regime == PREFILL:
                yield self.model.unroll(part, passes)[0].hidden
            else:
                first, state, _ = self.model.unroll(part[:, :half], passes)
                rest, _ = self.model.sequential(part[:, half:], state)
                yield torch.cat([first.hidden[:, -1:], rest.hidden], dim=1)

    @torch.no_grad()
    def _trace(self, ids: np.ndarray, start: int, passes: int) -> Trace:
        tokens, state, parts = torch.from_numpy(ids), None, []
        if start:
            first, state, _ = self.model.unroll(tokens[:, :start], passes)
            parts.append(first)
        stepped, state = self.model.sequential(tokens[:, start:], state)
        parts.append(stepped)
        return Trace(
            ids=ids,
            start=start,
            hidden=torch.cat([part.hidden for part in parts], dim=1),
            states={name: torch.cat([part.states[name] for part in parts], dim=1) for name in stepped.states},
            keys=state.keys,
            values=state.values,
        )

    @torch.no_grad()
    def _continuation(self, prompts: np.ndarray, new_tokens: int) -> Continuation:
        fed, state = torch.from_numpy(prompts), None
        tokens, states, spread = [], [], []
        for _ in range(new_tokens):
            done, state = self.model.sequential(fed, state)
            states.append(done.hidden[:, -1:])
            logits = self.model.head(states[-1])
            fed = logits.argmax(dim=-1)
            tokens.append(fed)
            spread.append(logits.double().std(dim=-1, correction=0))
        return Continuation(
            tokens=torch.cat(tokens, dim=1).numpy(),
            hidden=torch.cat(states, dim=1),
            spread=torch.cat(spread, dim=1).numpy(),
        )
