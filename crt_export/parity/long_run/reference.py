"""PyTorch FP32 over a long run: computed once, shared by every target."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from crt_export.model import Carry, Model
from crt_export.parity.long_run.schedule import BLOCK, Schedule, too_short
from crt_export.parity.reference import STEP, Reference
from crt_export.parity.setup import ParitySetup
from crt_export.parity.windows import Windows
from crt_export.progress import Progress
from crt_export.rotary import rope_tables
from crt_export.text import cut_sequences

#: Finished runs by what they ran (kind, window, text and model of a setup); a longer run serves shorter ones too.
_FINISHED: WeakKeyDictionary[ParitySetup, dict[tuple[str, int | None], LongReference]] = WeakKeyDictionary()


class LongReference(Reference):
    """The states of one long run, as the one window that a scorer compares with."""

    def __init__(self, model: Model, windows: Windows, window: int | None, progress: Progress) -> None:
        """Take the tokens as one window.

        Args:
            model: PyTorch FP32.
            windows: One window of all tokens.
            window: Tokens after which the cache is emptied and the state carried over; None: never.
            progress: Told how many tokens are done.
        """
        super().__init__(model, windows, batch=1)
        self._window, self._progress = window, progress

    @property
    def states(self) -> Tensor:
        """h after every token, float32 [tokens, hidden]."""
        return self.hidden(STEP, 0)[0]

    def shortened(self, tokens: int) -> LongReference:
        """The same run, ended earlier; nothing is computed again."""
        other = LongReference(self.model, self.windows.part(length=tokens), self._window, self._progress)
        other._hidden[STEP, 0] = self.hidden(STEP, 0)[:, :tokens]
        return other

    @torch.no_grad()
    def _rollout(self, regime: str, passes: int) -> Iterator[Tensor]:
        """The recurrence, piece by piece."""
        ids = torch.from_numpy(self.windows.inputs)
        carry, piece, states = self.model.start(1), self._window or BLOCK, []
        for start in range(0, ids.shape[1], piece):
            self._progress("PyTorch FP32: long run", start, ids.shape[1])
            if self._window is not None:
                carry = self._emptied(carry)
            h, carry = self.model.sequential(ids[:, start : start + piece], carry)
            states.append(h)
        yield torch.cat(states, dim=1)

    def _emptied(self, carry: Carry) -> Carry:
        """Position 0 and nothing cached; the state stays."""
        return dataclasses.replace(self.model.start(1), state=carry.state)


def long_reference(setup: ParitySetup, schedule: Schedule) -> LongReference:
    """The reference of one run, as long as the schedule asks for.

    Args:
        setup: Model and text.
        schedule: What to run.

    Raises:
        InputError: The text is too short.
    """
    finished = _FINISHED.setdefault(setup, {})
    key = (schedule.kind, schedule.window)
    if key not in finished or finished[key].windows.length < schedule.tokens:
        model = _with_positions(setup.model, schedule.window or schedule.tokens)
        windows = _one_window(setup, schedule)
        finished[key] = LongReference(model, windows, schedule.window, setup.progress)
    run = finished[key]
    return run if run.windows.length == schedule.tokens else run.shortened(schedule.tokens)


def _one_window(setup: ParitySetup, schedule: Schedule) -> Windows:
    """All tokens as one window, in which every start from an empty cache is the begin of a sequence."""
    text, tokens = setup.text, schedule.tokens
    cut = cut_sequences(text.ids, tokens=tokens, window=schedule.window or tokens, bos=text.bos_token_id)
    if isinstance(cut, int):
        raise too_short(text, tokens, cut)
    return Windows(inputs=cut.inputs[None], targets=cut.targets[None], text=text)


def _with_positions(model: Model, positions: int) -> Model:
    """The model itself, or one of the same weights whose rotary tables reach as far."""
    config = model.config
    if positions <= model.rope_cos.shape[0]:
        return model
    longer = copy.copy(model)
    longer._buffers = dict(model._buffers)  # the tables of the original stay
    longer.rope_cos, longer.rope_sin = rope_tables(positions, config.head_dim, config.rope_theta)
    return longer
