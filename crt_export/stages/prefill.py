"""Stage: how each target takes prompts.

Token by token is exact; passes are worth their difference where they are faster. What the build does:

* Rules, the same for every model: INT8 weights on a CPU step, as their steps are so fast that passes gain little. Other
  targets on a CPU make adaptive passes where a bound for the residual is known, else the passes they were built with;
  targets on a GPU always make those. Chunks of fewer tokens than twice the passes within the limit (without adaptive
  passes: of no more tokens than passes) go token by token. Adaptive chunks have at most 256 tokens, as one token whose
  residual is large holds up its whole chunk. No rule times this model on this machine; ``crt-export bench`` does.
* Measured by the build, on this model and text: the number of passes within the limit of perplexity and the bound,
  simulated with PyTorch FP32 on windows of one chunk that start from nothing
  (:mod:`crt_export.parity.certificate.curves`). That later chunks of a prompt and other precisions behave alike is
  assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import UnsupportedError
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity.certificate.curves import Stopping, perplexity_gap_interval, smallest_passes, stopping_bound
from crt_export.parity.tolerances import load_tolerances
from crt_export.profile import EngineProfile
from crt_export.progress import Progress, no_progress
from crt_export.runtime.prefill import ADAPTIVE, PASSES, STEPS, PrefillPlan
from crt_export.text import Sequences, TokenText, cut_sequences, fill_unscored

CHUNK = 256
_MOST_PASSES = 16
#: Numbers of passes in a row within the limit after which more would say nothing new.
_SETTLED = 3
#: Tokens that are measured: as many as keep this many multiply-accumulates per pass, within limits.
_WORK, _FEWEST_TOKENS, _MOST_TOKENS = 125_000_000_000, 1024, 4096
_FEWEST_WINDOWS = 4
#: Passes after which a trained model predicts text better than chance by far.
_FIRST_LOOK = 3


@dataclass(frozen=True, kw_only=True)
class PassLimits:
    """When passes over a chunk may stop.

    Attributes:
        chunk: Tokens of the chunks it was measured on.
        passes: Smallest number of passes within the limit of perplexity with 95 % confidence.
        stopping: The bound on the residual that holds it.
    """

    chunk: int
    passes: int
    stopping: Stopping


def prefill_plans(
    checkpoint: Checkpoint,
    profiles: Sequence[EngineProfile],
    text: TokenText | None,
    progress: Progress = no_progress,
) -> dict[str, PrefillPlan]:
    """How every target takes prompts, by its name.

    Args:
        checkpoint: The model.
        profiles: Resolved targets.
        text: What the bound is measured on; None where there is none.
        progress: Told what is measured.

    Raises:
        UnsupportedError: A profile insists on adaptive passes, and there is no bound for this model.
    """
    wanted = [profile for profile in profiles if _has_bound(profile, checkpoint.config)]
    chunk = min([CHUNK, *(profile.seq.max for profile in wanted)])
    limits = pass_limits(checkpoint, text, chunk, progress) if wanted and text is not None else None
    return {profile.name: _plan(profile, checkpoint.config, limits) for profile in profiles}


def pass_limits(
    checkpoint: Checkpoint, text: TokenText, chunk: int, progress: Progress = no_progress
) -> PassLimits | None:
    """Measure when passes may stop, with PyTorch FP32.

    Args:
        checkpoint: A model that is iterated.
        text: Its end is used, which validation sees last.
        chunk: Tokens of a chunk.
        progress: Told how many passes are done.

    Returns:
        None where the model predicts the text no better than chance, the text is too short, or no bound holds.
    """
    tokens = min(max(_WORK // checkpoint.config.parameter_count, _FEWEST_TOKENS), _MOST_TOKENS)
    count = min(max(tokens // chunk, _FEWEST_WINDOWS), (len(text) - 1) // chunk)
    if count < _FEWEST_WINDOWS or chunk < 2:
        return None
    cut = _last_windows(text, count, chunk)
    if cut is None:
        return None
    inputs, targets = (torch.from_numpy(part.reshape(count, chunk)) for part in (cut.inputs, cut.targets))
    model, tolerances = model_from_checkpoint(checkpoint), load_tolerances()
    if not _predicts(model, inputs, targets, tolerances.learnt_share):
        return None
    return _measured(model, inputs, targets, tolerances.perplexity_gap, progress)


def _last_windows(text: TokenText, count: int, chunk: int) -> Sequences | None:
    """Windows that the text ends with, each from nothing; None where it is too short."""
    start, bos = len(text) - count * chunk - 1, text.bos_token_id
    if bos is not None:  # a window may pass over one that the ids have at its start
        start = max(0, start - min(count, int((text.ids[start:] == bos).sum())))
    cut = cut_sequences(text.ids, tokens=count * chunk, window=chunk, bos=bos, start=start)
    return None if isinstance(cut, int) else cut


@torch.no_grad()
def _predicts(model: LanguageModel, inputs: Tensor, targets: Tensor, learnt_share: float) -> bool:
    """Whether a few passes over one window predict it clearly better than a uniform guess."""
    done, _, _ = model.unroll(inputs[:1], _FIRST_LOOK)
    return float(_nll(model, done.hidden, targets[:1]).mean()) < learnt_share * math.log(model.config.vocab_size)


@torch.no_grad()
def _measured(
    model: LanguageModel, inputs: Tensor, targets: Tensor, limit: float, progress: Progress
) -> PassLimits | None:
    label, most = "measure when passes of a prefill may stop", min(_MOST_PASSES, inputs.shape[1])
    progress(label, 0, most)
    sequential = _nll(model, model.sequential(inputs)[0].hidden, targets)
    iterate, residuals, nlls, gaps = None, [], [], []
    for done in range(1, most + 1):
        last, _, residual = model.unroll(inputs, 1, iterate=iterate)
        iterate = last.states
        residuals.append(residual.double().numpy())
        nlls.append(_nll(model, last.hidden, targets))
        gaps.append(perplexity_gap_interval(nlls[-1], sequential))
        progress(label, done, most)
        if len(gaps) >= _SETTLED and all(gap.within(limit) for gap in gaps[-_SETTLED:]):
            break
    progress(label, most, most)
    passes = range(1, len(gaps) + 1)
    smallest = smallest_passes(passes, gaps, limit)
    stopping = stopping_bound(passes, np.stack(residuals), np.stack(nlls), sequential, limit)
    if smallest is None or stopping is None:
        return None
    return PassLimits(chunk=inputs.shape[1], passes=smallest, stopping=stopping)


def _nll(model: LanguageModel, hidden: Tensor, targets: Tensor) -> np.ndarray:
    """Negative log-likelihood of the next tokens, nats, float64 [windows, positions]; by window, to save memory."""
    found = [
        -torch.log_softmax(model.head(states).double(), dim=-1).gather(-1, wanted[:, None])[:, 0]
        for states, wanted in zip(hidden, targets.clamp(min=0), strict=True)
    ]
    return fill_unscored(torch.stack(found).numpy(), targets.numpy())


def _has_bound(profile: EngineProfile, config: ModelConfig) -> bool:
    """Whether it can look at the residual between passes."""
    return config.carried.iterated and profile.device == "cpu"


def _plan(profile: EngineProfile, config: ModelConfig, limits: PassLimits | None) -> PrefillPlan:
    unroll = profile.unroll or 1
    if not config.carried.iterated:
        return PrefillPlan(passes=1)
    known = limits if _has_bound(profile, config) else None
    if known is None and profile.prefill == ADAPTIVE:
        raise UnsupportedError(
            f"{profile.name}: prefill = 'adaptive' needs a bound for the residual, and there is none: it is measured "
            "on the text of a validated build, which the model has to predict better than chance; use another prefill"
        )
    method = profile.prefill if profile.prefill != "auto" else _fastest(profile, known)
    if known is None:
        # As many passes as tokens are as exact as steps, and slower.
        return PrefillPlan(method=method, passes=unroll, shortest=unroll + 1)
    adaptive = method == ADAPTIVE
    return PrefillPlan(
        method=method,
        passes=unroll if method == PASSES else max(unroll, known.stopping.most_passes),
        chunk=known.chunk if adaptive or method == STEPS else None,
        shortest=2 * known.passes if adaptive else unroll + 1,
        residual_bound=known.stopping.bound,
        perplexity_gap=max(abs(known.stopping.gap.low), abs(known.stopping.gap.high)),
    )


def _fastest(profile: EngineProfile, known: PassLimits | None) -> str:
    if profile.device == "cpu" and profile.precision == "w8":
        return STEPS
    return PASSES if known is None else ADAPTIVE
