"""Schedule of a long run: which token is fed at which position, when the cache is emptied, and PyTorch FP32 on it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crt_export.config import ModelConfig
from crt_export.errors import InputError
from crt_export.models.base import LanguageModel
from crt_export.parity.reference import STEP, Reference
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.parity.windows import Windows
from crt_export.progress import Progress
from crt_export.runtime.slide import windows_of_caches
from crt_export.text import TokenText, cut_sequences

SINGLE = "single"
CHAINED = "chained"
#: Tokens of a block.
BLOCK = 1000
#: Tokens of a chained window where the training length is not known.
_DEFAULT_WINDOW = 256
#: At least so many observations of the growth, however long the windows are.
_UNITS = 32


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One run.

    Attributes:
        kind: ``single`` or ``chained``.
        tokens: Tokens fed.
        capacity: Room of the cache, tokens.
        unit: Tokens of one observation of the growth.
        window: Tokens after which the cache is emptied; None: never.
        trained: Training length of the model; None where it is not known.
        slides: Whether a full cache forgets what the attention window no longer sees.
    """

    kind: str
    tokens: int
    capacity: int
    unit: int
    window: int | None = None
    trained: int | None
    slides: bool = False

    @property
    def gated_tokens(self) -> int:
        """Tokens from the start on whose position is below the training length."""
        if self.kind == CHAINED:
            return self.tokens
        return min(self.tokens, self.trained or 0)

    @property
    def blocks(self) -> list[slice]:
        """Consecutive blocks; none of them lies on both sides of the training length."""
        edges = {0, self.tokens, *range(BLOCK, self.tokens, BLOCK)}
        if self.kind == SINGLE and self.trained:
            edges |= {self.trained // part for part in (8, 4, 2, 1) if 0 < self.trained // part < self.tokens}
        return [slice(start, stop) for start, stop in itertools.pairwise(sorted(edges))]


def schedules(case: ParityCase, config: ModelConfig, tokens: int) -> tuple[list[Schedule], list[str]]:
    """The runs of one target, and notes on what was shortened.

    Args:
        case: The target; its capacity is a limit.
        config: The model.
        tokens: Tokens asked for.
    """
    room, reason = config.max_position_embeddings, "max_position_embeddings of the model"
    if case.room(config) < room:
        room, reason = case.room(config), f"capacity of {case.target}"
    trained = config.training_sequence_length
    window = min(trained or _DEFAULT_WINDOW, room, tokens)
    windows = windows_of_caches(config.carried)
    slides = room < tokens and windows is not None and windows[0].size <= room
    length = tokens if slides else min(tokens, room)
    # ONNX Runtime's graphs leave the capacity open; those of a compiled target are fixed to theirs.
    runs = [
        Schedule(
            kind=SINGLE,
            tokens=length,
            capacity=case.capacity or min(length, room),
            unit=_unit(window, length),
            trained=trained,
            slides=slides,
        ),
        Schedule(
            kind=CHAINED,
            tokens=tokens,
            capacity=case.capacity or window,
            unit=_unit(window, tokens),
            window=window,
            trained=trained,
        ),
    ]
    return runs, _notes(case, config, runs, tokens, f"{reason} is {room:,}")


def check_length(text: TokenText, tokens: int) -> None:
    """Refuse a text that has not one token more than the run feeds.

    Raises:
        InputError: It has fewer; the message says what is needed.
    """
    if len(text) < tokens + 1:
        raise _too_short(text, tokens, tokens + 1)


def long_reference(setup: ParitySetup, schedule: Schedule) -> Reference:
    """PyTorch FP32 over one run, whose tokens are its one window; a longer run serves shorter ones too.

    Args:
        setup: Model and text.
        schedule: What to run.

    Raises:
        InputError: The text is too short.
    """
    runs: dict[tuple[str, int | None], Reference] = setup.reference.once("long run", dict)
    key, tokens = (schedule.kind, schedule.window), schedule.tokens
    if key not in runs or runs[key].windows.length < tokens:
        model, windows = _with_positions(setup.model, schedule.window or tokens), _one_window(setup.text, schedule)
        states = _states(model, windows.inputs, schedule.window, setup.progress)
        runs[key] = Reference(model, windows, batch=1, steps=states)
    whole = runs[key]
    if whole.windows.length == tokens:
        return whole
    return Reference(whole.model, whole.windows.part(length=tokens), batch=1, steps=whole.hidden(STEP, 0)[:, :tokens])


def _unit(window: int, tokens: int) -> int:
    """A window, or less where the run has few of them."""
    return max(1, min(window, tokens // _UNITS))


def _notes(case: ParityCase, config: ModelConfig, runs: list[Schedule], tokens: int, reason: str) -> list[str]:
    single, chained = runs
    name, notes = f"long run of {case.target}", []
    if single.tokens < tokens:
        advice = "; a build with a larger --capacity has the room" if reason.startswith("capacity") else ""
        notes.append(f"{name}: the single run has {single.tokens:,} of {tokens:,} tokens, {reason}{advice}")
    if single.slides:
        notes.append(f"{name}: {reason}, so the single run goes on by the runtime's slide rule; PyTorch counts on")
    if config.training_sequence_length is None:
        notes.append(
            f"{name}: the training length is not known, so the chained run has windows of {chained.window} tokens and "
            "the single run is reported, not gated"
        )
    elif chained.window is not None and chained.window < config.training_sequence_length:
        notes.append(f"{name}: chained windows of {chained.window} tokens, {reason}")
    return notes


def _too_short(text: TokenText, tokens: int, needed: int) -> InputError:
    return InputError(
        f"{text.source}: {len(text):,} held-out tokens are too few for the long run, which feeds {tokens:,} and "
        f"needs one more to predict: give a text of at least {needed:,} tokens (--text FILE or --tokens "
        "FILE.npy), leave the level long-run out, or ask for a shorter run (long_run_tokens)"
    )


def _one_window(text: TokenText, schedule: Schedule) -> Windows:
    """All tokens as one window, in which every start from an empty cache is the begin of a sequence."""
    tokens = schedule.tokens
    cut = cut_sequences(text.ids, tokens=tokens, window=schedule.window or tokens, bos=text.bos_token_id)
    if isinstance(cut, int):
        raise _too_short(text, tokens, cut)
    return Windows(inputs=cut.inputs[None], targets=cut.targets[None], text=text)


def _with_positions(model: LanguageModel, positions: int) -> LanguageModel:
    """The model itself, or one of the same weights whose tables reach as far."""
    if positions <= model.config.max_position_embeddings:
        return model
    longer = copy.copy(model)
    longer._buffers = dict(model._buffers)  # the tables of the original stay
    longer.config = dataclasses.replace(model.config, max_position_embeddings=positions)
    longer.reset_tables()
    return longer


@torch.no_grad()
def _states(model: LanguageModel, tokens: np.ndarray, window: int | None, progress: Progress) -> Tensor:
    """h after every token, float32 [1, tokens, hidden]; after every window the cache is emptied and the state stays."""
    ids, state, hidden = torch.from_numpy(tokens), model.start(1), []
    for start in range(0, ids.shape[1], window or BLOCK):
        progress("PyTorch FP32: long run", start, ids.shape[1])
        if window is not None:
            state = dataclasses.replace(model.start(1), states=state.states)
        done, state = model.sequential(ids[:, start : start + (window or BLOCK)], state)
        hidden.append(done.hidden)
    return torch.cat(hidden, dim=1)
