"""The regimes in PyTorch, from :mod:`crt_export.model` alone: what every exported form is compared with.

Regimes are named for what the deployment runs: ``step`` is the exact recurrence, ``prefill`` is K parallel passes over
the whole window, ``handover`` is K passes over its first half and the recurrence from there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crt_export.model import Carry, Model
from crt_export.parity.windows import Windows

STEP = "step"
PREFILL = "prefill"
PREFILL_PASS = "prefill_pass"
HANDOVER = "handover"


def first_position(regime: str, length: int) -> int:
    """Index of the first prediction that the regime delivers for a window of this length."""
    return length // 2 - 1 if regime == HANDOVER else 0


class Reference:
    """Hidden states of every regime, computed once for all windows and then shared.

    Only h is kept, [windows, positions, hidden]; logits are made from it in the pieces they are needed in.
    """

    def __init__(self, model: Model, windows: Windows, *, batch: int) -> None:
        """Take a model in evaluation mode.

        Args:
            model: Reference model, any dtype.
            windows: What to run it on.
            batch: Windows per call.
        """
        self.model, self.windows, self._batch = model, windows, batch
        self._hidden: dict[tuple[str, int], Tensor] = {}
        self._decoded: tuple[Tensor, tuple[Tensor, Carry]] | None = None

    def first_windows(self, count: int) -> Reference:
        """The reference on the first windows alone; what was computed for all of them is not computed again."""
        part = Reference(self.model, self.windows.part(windows=count), batch=self._batch)
        part._hidden = {key: hidden[:count] for key, hidden in self._hidden.items()}
        return part

    def decode(self, ids: Tensor) -> tuple[Tensor, Carry]:
        """The recurrence on some ids, int64 [rows, tokens]: h and the carry, to be read only; the last is kept."""
        if self._decoded is None or not torch.equal(self._decoded[0], ids):
            self._decoded = (ids, self.model.sequential(ids))
        return self._decoded[1]

    def hidden(self, regime: str, passes: int) -> Tensor:
        """h of the scored positions, [windows, positions, hidden]; see :func:`first_position` for where they start."""
        regime = PREFILL if regime == PREFILL_PASS else regime
        key = (regime, 0 if regime == STEP else passes)
        if key not in self._hidden:
            self._hidden[key] = torch.cat([*self._rollout(regime, passes)])
        return self._hidden[key]

    @torch.no_grad()
    def logits(self, regime: str, passes: int, windows: slice, positions: slice) -> Tensor:
        """Logits of some windows and positions, float32 [windows, positions, vocab]."""
        start = first_position(regime, self.windows.length)
        wanted = slice(positions.start - start, positions.stop - start)
        return self.model.head(self.hidden(regime, passes)[windows, wanted]).float()

    @torch.no_grad()
    def _rollout(self, regime: str, passes: int) -> Iterator[Tensor]:
        ids = torch.from_numpy(self.windows.inputs)
        half = self.windows.length // 2
        for part in ids.split(self._batch):
            if regime == STEP:
                yield self.model.sequential(part)[0]
            elif regime == PREFILL:
                yield self.model.unroll(part, passes)[0]
            else:
                first, carry, _ = self.model.unroll(part[:, :half], passes)
                rest, _ = self.model.sequential(part[:, half:], carry)
                yield torch.cat([first[:, -1:], rest], dim=1)
