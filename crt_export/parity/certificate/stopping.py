"""When passes may stop: the residual below which what is left of the regime gap is worth no perplexity.

Simulated from what every number of passes gave on every window: a window stops at its first pass whose residual is at
most the bound, and one that never gets there is fed token by token, which costs nothing but time. A bound holds if the
perplexity of windows stopped so lies within the limit of the recurrence's with 95 % confidence. The one that is taken
is the largest up to which every smaller one holds too: one that holds beyond others that do not is luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crt_export.parity.certificate.spans import perplexity_gap_interval
from crt_export.parity.statistics import Interval

#: Bounds that are tried at most; quantiles of the residuals where there are more of those.
_MOST_BOUNDS = 200


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """Where passes stop.

    Attributes:
        bound: Largest |change of h| of a pass that may be the last.
        gap: Perplexity of windows that stopped there - the recurrence's, 95 % interval over windows.
        passes: Mean number of passes of the windows that stopped; NaN where none did.
        most_passes: Largest of them.
        unreached: Share of the windows that never got there and went token by token.
    """

    bound: float
    gap: Interval
    passes: float
    most_passes: int
    unreached: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, see :mod:`crt_export.parity.certificate`."""
        return {
            "bound": self.bound,
            "perplexity_gap": self.gap.mean,
            "perplexity_gap_ci": [self.gap.low, self.gap.high],
            "passes_mean": self.passes,
            "passes_most": self.most_passes,
            "unreached": self.unreached,
        }


def stopping_bound(
    passes: Sequence[int], residual: np.ndarray, nll: np.ndarray, sequential_nll: np.ndarray, limit: float
) -> Stopping | None:
    """The largest bound on the residual that holds.

    Args:
        passes: Numbers of passes, rising.
        residual: Largest |change of h| in the last of them, float [passes, windows].
        nll: Negative log-likelihood after them, nats, float64 [passes, windows, positions].
        sequential_nll: In the recurrence, float64 [windows, positions].
        limit: Largest |perplexity gap|.

    Returns:
        None where no bound holds.
    """
    candidates = np.unique(residual[residual > 0])
    if len(candidates) > _MOST_BOUNDS:
        candidates = np.unique(np.quantile(candidates, np.linspace(0, 1, _MOST_BOUNDS), method="lower"))
    found = None
    for bound in candidates.tolist():
        stopping = _stopped(bound, passes, residual, nll, sequential_nll)
        if not stopping.gap.within(limit):
            break
        found = stopping
    return found


def _stopped(
    bound: float, passes: Sequence[int], residual: np.ndarray, nll: np.ndarray, sequential_nll: np.ndarray
) -> Stopping:
    small = np.asarray(residual <= bound)
    reached = np.any(small, axis=0)
    first = np.argmax(small, axis=0)
    windows = np.arange(residual.shape[1])
    after = np.where(reached[:, None], nll[first, windows], sequential_nll)
    made = np.asarray(passes)[first[reached]]
    return Stopping(
        bound=bound,
        gap=perplexity_gap_interval(after, sequential_nll),
        passes=float(made.mean()) if len(made) else float("nan"),
        most_passes=int(made.max(initial=0)),
        unreached=float(1 - reached.mean()),
    )
