"""Decoding that continues from K passes, against decoding that went on from the recurrence."""

from __future__ import annotations

from typing import Any

import numpy as np

from crt_export.parity.certificate.coverage import Coverage
from crt_export.parity.certificate.measurement import Continuation, Measurement
from crt_export.parity.certificate.spans import bounds
from crt_export.parity.statistics import Interval, paired_interval


def handover_curves(measured: Measurement, coverage: Coverage, reference: Measurement | None) -> list[dict[str, Any]]:
    """The agreed ``handover`` of the level's data, one per place of hand-over, gated ones first."""
    curves = []
    for index, continuation in enumerate(measured.continuations):
        deltas = [paired_interval(delta) for delta in _deltas(measured, continuation)]
        divergences = [paired_interval(kl) for kl in continuation.kl]
        excess = None
        if reference is not None:
            excess = [handover_excess(measured, reference, index, k) for k in range(len(deltas))]
        curves.append(
            {
                "start": continuation.handover.start,
                "stop": continuation.handover.stop,
                "gated": continuation.handover.gated,
                "passes": list(coverage.selected),
                "delta_nll": [interval.mean for interval in deltas],
                "delta_nll_ci": bounds(deltas),
                "kl": [interval.mean for interval in divergences],
                "kl_ci": bounds(divergences),
                "max_state_error": [float(error) for error in continuation.state_error],
                "excess": None if excess is None else [interval.mean for interval in excess],
                "excess_ci": None if excess is None else bounds(excess),
            }
        )
    return curves


def handover_excess(measured: Measurement, reference: Measurement, place: int, index: int) -> Interval:
    """How much more a hand-over costs the target than FP32, paired by token, nats.

    Args:
        measured: Of the target.
        reference: PyTorch FP32 on the same windows.
        place: Which hand-over.
        index: Which number of passes, an index of ``Coverage.selected``.
    """
    own, model = (_deltas(form, form.continuations[place])[index] for form in (measured, reference))
    return paired_interval(own - model)


def _deltas(measured: Measurement, continuation: Continuation) -> np.ndarray:
    """[passes, windows, positions] above the recurrence at the same tokens."""
    span = slice(continuation.handover.start, continuation.handover.stop)
    return continuation.nll - measured.sequential_nll[:, span]
