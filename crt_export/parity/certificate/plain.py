"""A plain transformer has one regime in two forms: its prefill is its step chain, up to rounding."""

from __future__ import annotations

import numpy as np

from crt_export.parity.case import ParityCase
from crt_export.parity.certificate.anchors import anchor_errors
from crt_export.parity.certificate.coverage import Coverage
from crt_export.parity.certificate.target_form import TargetForm
from crt_export.parity.level import ParitySetup
from crt_export.parity.reference import PREFILL


def plain_errors(case: ParityCase, setup: ParitySetup, coverage: Coverage) -> dict[str, float]:
    """Run prefill and the step chain on whole windows.

    Returns:
        Relative errors by tensor: caches, the last logits, and those of every step against the head of prefill's h.

    Raises:
        ContractError: A graph failed, or delivered NaN or infinity.
    """
    length = coverage.length
    ids = setup.windows.inputs[: coverage.windows]
    form = TargetForm(case, setup.config, ids, threads=setup.threads, kept=(length - 1,))
    errors: dict[str, float] = {}
    for rows in coverage.slices:
        setup.progress(f"{case.target}: certificate", rows.start, coverage.windows)
        for iterate in form.iterate(rows, length, (case.unroll,), graph=PREFILL):
            chain = form.chain(rows, hidden=iterate.hidden)
            found = dict(anchor_errors(iterate, chain, form.head, length))
            del found["next_hidden"]  # a plain step delivers none
            errors = {name: float(np.maximum(errors.get(name, 0.0), error)) for name, error in found.items()}
    errors["logits of every step"] = form.step_error
    return errors
