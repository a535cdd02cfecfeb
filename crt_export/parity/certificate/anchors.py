"""Exactness anchors: where the parallel passes are the recurrence by the equations, whatever the weights.

After k passes the first k positions are those of the recurrence, so T passes over T tokens give its states, caches and
logits up to rounding. ``prefill`` is held to it with its own K, over K tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from crt_export.parity.certificate.coverage import Coverage
from crt_export.parity.certificate.forms import Chain, Iterate, relative_error
from crt_export.parity.certificate.target_form import TargetForm
from crt_export.parity.reference import PREFILL


class Anchors:
    """Observer of a measurement: keeps the largest error of every comparison over the batches of windows.

    Attributes:
        errors: Largest relative error by (graph, tokens, passes), then by tensor.
        prefill_error: Of the hidden states of ``prefill`` against those of as many single passes.
        residual_error: Of the residual that the graph reports against the change of next_hidden, per pass.
    """

    def __init__(self, form: TargetForm, coverage: Coverage) -> None:
        """Prepare."""
        self._form, self._coverage = form, coverage
        self.errors: dict[tuple[str, int, int], dict[str, float]] = {}
        self.prefill_error = self.residual_error = 0.0

    def __call__(self, rows: slice, chain: Chain, states: np.ndarray, residual: np.ndarray) -> None:
        """Look at one batch of windows."""
        form, coverage = self._form, self._coverage
        unroll = coverage.unroll
        for tokens in coverage.anchors:
            passes = -(-tokens // form.stride) * form.stride
            self._compare((form.pass_graph, tokens, passes), rows, chain)
        if PREFILL not in form.case.graphs:
            return
        if form.stride == 1:
            self._compare((PREFILL, min(unroll, coverage.length), unroll), rows, chain)
            self._check_prefill(rows, states[coverage.passes.index(unroll)])
        self._check_residual(states, residual)

    def _compare(self, key: tuple[str, int, int], rows: slice, chain: Chain) -> None:
        graph, tokens, passes = key
        for iterate in self._form.iterate(rows, tokens, (passes,), graph=graph):
            found = anchor_errors(iterate, chain, self._form.head, tokens)
            known = self.errors.setdefault(key, dict.fromkeys(found, 0.0))
            self.errors[key] = {name: float(np.maximum(known[name], error)) for name, error in found.items()}

    def _check_prefill(self, rows: slice, states: np.ndarray) -> None:
        unroll = self._coverage.unroll
        for iterate in self._form.iterate(rows, states.shape[1], (unroll,), graph=PREFILL):
            error = relative_error(iterate.hidden, states)
            self.prefill_error = float(np.maximum(self.prefill_error, error))

    def _check_residual(self, states: np.ndarray, residual: np.ndarray) -> None:
        """Where one call is one pass, its residual is the change of what it was fed and delivers."""
        if self._form.stride > 1:
            return
        before = np.concatenate([np.zeros_like(states[:1]), states[:-1]])
        change = np.stack([np.abs(after - last).max(axis=(1, 2)) for after, last in zip(states, before, strict=True)])
        self.residual_error = float(np.maximum(self.residual_error, relative_error(residual, change)))


def anchor_errors(
    iterate: Iterate, chain: Chain, head: Callable[[np.ndarray], np.ndarray], tokens: int
) -> Mapping[str, float]:
    """Relative errors by tensor of passes over the first tokens against the steps over them.

    Args:
        iterate: What the passes gave.
        chain: What the steps gave; it has gone on since, and its caches hold these tokens still.
        head: States to logits.
        tokens: How many.
    """
    errors = {"next_hidden": relative_error(iterate.hidden, chain.hidden[:, :tokens])}
    for name, cache in iterate.caches.items():
        written = slice(0, tokens)
        errors[name.replace("past", "present")] = relative_error(
            cache[:, :, written], chain.caches[name][:, :, written]
        )
    assert iterate.logits is not None
    errors["logits"] = relative_error(iterate.logits, chain.logits[tokens - 1])
    errors["head logits"] = relative_error(head(iterate.hidden[:, -1:])[:, 0], chain.logits[tokens - 1])
    return errors
