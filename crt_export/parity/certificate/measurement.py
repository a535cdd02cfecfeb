"""Run one form through both regimes and keep a few numbers per token, never all logits.

Likelihoods are float64 throughout. A float32 log-softmax is right to about 1e-6 of a nat per token (2^-24 of sums near
10), with a bias that a mean does not remove; FP32's gaps are that small, and the float64 form costs little beside the
passes themselves. Both regimes' logits come through the same head, so that their difference is that of the states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crt_export.parity.certificate.coverage import Coverage, Handover
from crt_export.parity.certificate.forms import Chain, Form
from crt_export.parity.certificate.target_form import BLOCK_ELEMENTS
from crt_export.parity.scores import divergence
from crt_export.text import fill_unscored

#: Told, per batch of windows, what the chain gave and [passes, windows, ...] of the iterates and residuals.
Observer = Callable[[slice, Chain, np.ndarray, np.ndarray], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuation:
    """Decoding from K passes, per selected number of passes.

    Attributes:
        handover: From where to where.
        nll: Negative log-likelihood of the next token, nats, float64 [passes, windows, positions].
        kl: Divergence of the recurrence's distribution from this one, nats, same shape.
        state_error: Largest |h - h of the recurrence| over its largest |value|, float64 [passes].
    """

    handover: Handover
    nll: np.ndarray
    kl: np.ndarray
    state_error: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """One form's regimes on the same windows.

    Attributes:
        sequential_nll: Negative log-likelihood in the recurrence, nats, float64 [windows, positions].
        nll: After K passes, float64 [passes, windows, positions].
        kl: Divergence of the recurrence's distribution from that of K passes, nats, same shape.
        residual: Largest |change of h| in the last pass, float64 [passes, windows].
        error: Largest |h - h of the recurrence| after K passes, float64 [passes, windows].
        prefix_error: The same over the first K positions only and over the largest |h|, float64 [passes].
        continuations: One per hand-over.
    """

    sequential_nll: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    residual: np.ndarray
    error: np.ndarray
    prefix_error: np.ndarray
    continuations: tuple[Continuation, ...]


def measure(
    form: Form,
    coverage: Coverage,
    targets: np.ndarray,
    *,
    observe: Observer | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Run everything.

    Args:
        form: The target or the reference.
        coverage: What to run.
        targets: The token after each one, int64 [windows, positions].
        observe: Sees the states of every batch of windows.
        on_progress: Called with the number of windows done.

    Raises:
        ContractError: A graph failed, or delivered NaN or infinity.
    """
    parts = []
    for rows in coverage.slices:
        parts.append(_measure_rows(form, coverage, rows, targets[rows], observe))
        on_progress(rows.stop)
    return Measurement(
        sequential_nll=np.concatenate([part.sequential_nll for part in parts]),
        nll=np.concatenate([part.nll for part in parts], axis=1),
        kl=np.concatenate([part.kl for part in parts], axis=1),
        residual=np.concatenate([part.residual for part in parts], axis=1),
        error=np.concatenate([part.error for part in parts], axis=1),
        prefix_error=np.max([part.prefix_error for part in parts], axis=0),
        continuations=tuple(
            Continuation(
                handover=same[0].handover,
                nll=np.concatenate([one.nll for one in same], axis=1),
                kl=np.concatenate([one.kl for one in same], axis=1),
                state_error=np.max([one.state_error for one in same], axis=0),
            )
            for same in zip(*(part.continuations for part in parts), strict=True)
        ),
    )


def compare_states(
    form: Form, sequential: np.ndarray, found: np.ndarray | Sequence[np.ndarray], targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Likelihoods and divergences of several states against those of the recurrence, piece by piece.

    Args:
        form: Its head makes logits of states.
        sequential: h of the recurrence, float32 [windows, positions, hidden].
        found: Other h of the same tokens.
        targets: The token after each one, int64 [windows, positions].

    Returns:
        Negative log-likelihood of the recurrence [windows, positions], of the others and their divergence
        [found, windows, positions]; nats, float64.
    """
    nll = np.empty((1 + len(found), *targets.shape))
    kl = np.empty((len(found), *targets.shape))
    wanted = torch.from_numpy(targets).clamp(min=0).unsqueeze(-1)
    size = max(1, BLOCK_ELEMENTS // (len(targets) * form.vocab))
    for first in range(0, targets.shape[1], size):
        piece = slice(first, first + size)
        own = _wide(form.head(sequential[:, piece]))
        expected = torch.log_softmax(own, dim=-1)
        nll[0, :, piece] = -expected.gather(-1, wanted[:, piece]).squeeze(-1).numpy()
        for index, states in enumerate(found):
            logits = _wide(form.head(states[:, piece]))
            after = torch.log_softmax(logits, dim=-1)
            nll[1 + index, :, piece] = -after.gather(-1, wanted[:, piece]).squeeze(-1).numpy()
            kl[index, :, piece] = divergence(expected, after, logits.sub_(own)).numpy()
    nll = fill_unscored(nll, targets)
    return nll[0], nll[1:], kl


def _measure_rows(
    form: Form, coverage: Coverage, rows: slice, targets: np.ndarray, observe: Observer | None
) -> Measurement:
    chain = form.chain(rows)
    shape = chain.hidden.shape
    states, residual = np.empty((len(coverage.passes), *shape), np.float32), np.empty((len(coverage.passes), shape[0]))
    for index, iterate in enumerate(form.iterate(rows, shape[1], coverage.passes)):
        states[index], residual[index] = iterate.hidden, iterate.residual
    scale = _largest(chain.hidden)
    errors = [np.abs(after - chain.hidden).max(axis=-1) for after in states]
    sequential_nll, nll, kl = compare_states(form, chain.hidden, states, targets)
    if observe is not None:
        observe(rows, chain, states, residual)
    return Measurement(
        sequential_nll=sequential_nll,
        nll=nll,
        kl=kl,
        residual=residual,
        error=np.stack([error.max(axis=-1) for error in errors]).astype(np.float64),
        prefix_error=np.array(
            [error[:, :passes].max() / scale for passes, error in zip(coverage.passes, errors, strict=True)]
        ),
        continuations=tuple(
            _continue(form, coverage, rows, chain.hidden, targets, handover) for handover in coverage.handovers
        ),
    )


def _continue(
    form: Form, coverage: Coverage, rows: slice, sequential: np.ndarray, targets: np.ndarray, handover: Handover
) -> Continuation:
    span = slice(handover.start, handover.stop)
    expected = sequential[:, span]
    found = [*form.continued(rows, span.start, span.stop, coverage.selected)]
    _, nll, kl = compare_states(form, expected, found, np.ascontiguousarray(targets[:, span]))
    scale = _largest(expected)
    return Continuation(
        handover=handover,
        nll=nll,
        kl=kl,
        state_error=np.array([np.abs(states - expected).max() / scale for states in found], np.float64),
    )


def _wide(logits: np.ndarray) -> Tensor:
    return torch.from_numpy(logits).double()


def _largest(states: np.ndarray) -> float:
    return max(float(np.abs(states).max()), float(np.finfo(np.float32).tiny))
