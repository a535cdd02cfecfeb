"""Observe what enters every linear while the FP32 model runs over real text, in every regime it is deployed in.

Activations differ between the first pass (h = 0 everywhere), the later passes of a prefill and decoding, so all three
are run and get equal shares of the sample. Folding rescales channels after the fact, which is why rows of activations
are kept and not one histogram: any range can be computed for any folding without running the model again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from crt_export.checked import Checked, Rules, whole
from crt_export.errors import InputError
from crt_export.models.base import LanguageModel, Pass, State
from crt_export.progress import Progress, no_progress
from crt_export.quantize.linears import HEAD, LinearInput, linear_inputs
from crt_export.quantize.text_evidence import TextEvidence, check_is_text
from crt_export.text import begin_rows

_STAGE = "calibrate w8a8"
#: Values kept per activation, spread evenly over the regimes (4 bytes each), and rows kept however wide they are.
_SAMPLE_VALUES, _MINIMUM_ROWS = 4_000_000, 1024
#: Tokens that go through the model at once; bounds the memory, does not change the result's kind.
_BATCH_TOKENS = 4096
#: Of windows longer than twice this, only so many tokens at either end are decoded one by one.
_DECODED_TOKENS = 128
#: Of the choice of rows.
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(Checked):
    """How much to observe.

    Attributes:
        windows: Text windows that :func:`calibration_windows` cuts.
        minimum_tokens: Fewer tokens than this are refused.
    """

    HEADING: ClassVar[str] = "calibration options"
    RULES: ClassVar[Rules] = {"windows": whole("at least 1", least=1), "minimum_tokens": whole("at least 1", least=1)}

    windows: int = 32
    minimum_tokens: int = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class InputStatistics:
    """What was seen of one activation.

    Attributes:
        rows: Sampled rows, float32 [rows, channels].
        absmax: Largest magnitude of each channel over all rows seen, float32 [channels].
        rows_seen: Number of those rows.
    """

    rows: NDArray[np.float32]
    absmax: NDArray[np.float32]
    rows_seen: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationStatistics:
    """What was seen of every activation that enters a linear.

    Attributes:
        inputs: By name of the activation, see :func:`crt_export.quantize.linears.linear_inputs`.
        unroll: Passes K of the unrolled regime.
        evidence: Why the tokens were taken for text.
    """

    inputs: Mapping[str, InputStatistics]
    unroll: int
    evidence: TextEvidence


def calibration_windows(
    tokens: NDArray[np.int64], *, seq: int, options: CalibrationOptions | None = None, bos: int | None = None
) -> NDArray[np.int64]:
    """Cut windows out of a text, evenly spread over all of it.

    Args:
        tokens: The text, int64 [tokens].
        seq: Window length in tokens, at most the model's ``max_position_embeddings``.
        options: Number of windows and the minimum of text.
        bos: The model's begin-of-sequence token, which every window begins with; None if it has none.

    Returns:
        int64 [windows, seq], non-overlapping; fewer windows than asked if the text has no more.

    Raises:
        InputError: Too little text.
    """
    options = options or CalibrationOptions()
    needed = max(options.minimum_tokens, seq)
    available = tokens.size // seq
    if tokens.ndim != 1 or available * seq < options.minimum_tokens:
        raise InputError(
            f"text too short to calibrate on: expected at least {-(-needed // seq) * seq} tokens "
            f"({-(-needed // seq)} windows of {seq}), found {tokens.size}"
        )
    chosen = np.unique(np.linspace(0, available - 1, min(options.windows, available)).round().astype(np.int64))
    enough = -(-options.minimum_tokens // seq)
    if chosen.size < enough:
        chosen = np.linspace(0, available - 1, enough).round().astype(np.int64)
    return begin_rows(tokens[: available * seq].reshape(available, seq)[chosen].astype(np.int64), bos)


@torch.no_grad()
def calibrate(
    model: LanguageModel,
    tokens: NDArray[np.int64],
    *,
    unroll: int,
    options: CalibrationOptions | None = None,
    progress: Progress = no_progress,
) -> ActivationStatistics:
    """Run the model over real text and record what enters its linears.

    Args:
        model: The FP32 reference model.
        tokens: Real text, int64 [windows, seq].
        unroll: Passes K of the prefill that will be deployed; a model that is not iterated always runs one.
        options: How much to observe.
        progress: Told how many tokens went through the model.

    Returns:
        Statistics over the first pass, passes 2 to K, and sequential decoding: of whole windows up to
        256 tokens, else of the first and, from where K passes have left the cache, the last 128 of each.

    Raises:
        InputError: The tokens are too few, too long, out of range, or not text.
    """
    options = options or CalibrationOptions()
    if unroll < 1:
        raise InputError(f"number of passes K must be at least 1, found {unroll}")
    if tokens.ndim == 2 and tokens.shape[1] > model.config.max_position_embeddings:
        raise InputError(
            f"expected calibration windows of at most max_position_embeddings {model.config.max_position_embeddings} "
            f"tokens, found {tokens.shape[1]}"
        )
    if tokens.size < options.minimum_tokens:
        raise InputError(
            f"text too short to calibrate on: expected at least {options.minimum_tokens} tokens, found {tokens.size}"
        )
    evidence = check_is_text(tokens, model.config.vocab_size)
    passes = unroll if model.carried.iterated else 1
    observer = _Observer(model)
    done = 0
    progress(_STAGE, done, tokens.size)
    with observer.watching(model):
        for batch in _batches(tokens):
            _run_regimes(model, batch, passes, tokens.shape[0], observer)
            done += batch.numel()
            progress(_STAGE, done, tokens.size)
    return ActivationStatistics(inputs=observer.statistics(), unroll=passes, evidence=evidence)


def _batches(tokens: NDArray[np.int64]) -> Iterator[torch.Tensor]:
    windows = max(1, _BATCH_TOKENS // tokens.shape[1])
    for start in range(0, tokens.shape[0], windows):
        yield torch.from_numpy(np.ascontiguousarray(tokens[start : start + windows], dtype=np.int64))


def _run_regimes(model: LanguageModel, ids: torch.Tensor, passes: int, windows: int, observer: _Observer) -> None:
    """First pass, later passes, decoding; each regime is told how many rows it will deliver in total."""
    regimes, seq = 3 if passes > 1 else 2, ids.shape[1]
    done, after = None, None
    for k in range(passes):
        observer.expect(windows * seq * (1 if k == 0 else passes - 1), regimes)
        done, after, _ = model.unroll(ids, 1, iterate=None if done is None else done.states)
        observer.observe(HEAD, model.final_norm(done.hidden))
    assert done is not None
    assert after is not None
    if seq <= 2 * _DECODED_TOKENS or not model.carried.parallel:
        pieces: list[tuple[torch.Tensor, State | None]] = [(ids, None)]
    else:
        last = _state_at(seq - _DECODED_TOKENS, done, after)
        pieces = [(ids[:, :_DECODED_TOKENS], None), (ids[:, -_DECODED_TOKENS:], last)]
    observer.expect(windows * sum(piece.shape[1] for piece, _ in pieces), regimes)
    for piece, state in pieces:
        decoded, _ = model.sequential(piece, state)
        observer.observe(HEAD, model.final_norm(decoded.hidden))


def _state_at(position: int, done: Pass, after: State) -> State:
    """What decoding would continue from had the passes ended before ``position``: every pass is causal."""
    return State(
        states={name: values[:, position - 1 : position] for name, values in done.states.items()},
        keys=tuple(keys[:, :, :position] for keys in after.keys),
        values=tuple(values[:, :, :position] for values in after.values),
        position=torch.full_like(after.position, position),
    )


class _Observer:
    """Extremes of all rows, and a seeded random sample of them with equal shares for the regimes."""

    def __init__(self, model: LanguageModel) -> None:
        self._generator = torch.Generator().manual_seed(_SEED)
        self._inputs = {group.name: group for group in linear_inputs(model.config)}
        self._rows: dict[str, list[torch.Tensor]] = {name: [] for name in self._inputs}
        self._absmax: dict[str, torch.Tensor] = {}
        self._seen = dict.fromkeys(self._inputs, 0)
        self._total, self._regimes = 1, 1

    def expect(self, total: int, regimes: int) -> None:
        """Rows now come from a regime that delivers ``total`` of them, one of ``regimes`` with equal shares."""
        self._total, self._regimes = total, regimes

    @contextmanager
    def watching(self, model: LanguageModel) -> Iterator[None]:
        """Observe the input of one linear per activation; the head's is observed without computing its product."""
        handles = [self._hook(model, group) for group in self._inputs.values() if group.name != HEAD]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, model: LanguageModel, group: LinearInput) -> torch.utils.hooks.RemovableHandle:
        def before_forward(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self.observe(group.name, inputs[0])

        return model.get_submodule(group.linears[0]).register_forward_pre_hook(before_forward)

    def observe(self, name: str, x: torch.Tensor) -> None:
        """Take in rows [..., channels] of one activation."""
        rows = x.reshape(-1, x.shape[-1]).float()
        absmax = rows.abs().amax(0)
        self._absmax[name] = torch.maximum(self._absmax[name], absmax) if name in self._absmax else absmax
        self._seen[name] += rows.shape[0]
        keep = max(_MINIMUM_ROWS, _SAMPLE_VALUES // rows.shape[1])
        chance = keep / self._regimes / self._total
        chosen = torch.rand(rows.shape[0], generator=self._generator) < chance
        if bool(chosen.any()):
            self._rows[name].append(rows[chosen].clone())

    def statistics(self) -> dict[str, InputStatistics]:
        return {
            name: InputStatistics(
                rows=torch.cat(self._rows[name]).numpy(),
                absmax=self._absmax[name].numpy(),
                rows_seen=self._seen[name],
            )
            for name in self._inputs
        }
