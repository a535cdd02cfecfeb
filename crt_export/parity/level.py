"""The ladder: what a level of evidence takes and what it answers.

Every level but the first is one module of this package with one function ``(ParityCase, ParitySetup) -> LevelResult``;
later levels ask more of a target than earlier ones. The first one looks at what all targets are compared with:

======================  ==============  ==========================================================================
level                   module          question
======================  ==============  ==========================================================================
``own-model``           own_model       Does the reference compute what the user's own PyTorch model does? (--expect)
L0 ``contract``         contract        Are the files what was agreed: names, dtypes, operators, weights, nothing else?
L1 ``one-step``         one_step        One call from the reference's own state: is every output tensor right?
                        interchange     Are graphs that no session opens, to the bit, what a session computes?
L2 ``chain``            chain           Fed its own state for many steps: which tensor leaves the reference first?
L3 ``corpus``           corpus          On a text: likelihood, divergence and agreement, with confidence intervals.
L4 ``free-running``     free_running    Fed its own tokens: how long does it say the same?
L5 ``certificate``      certificate     Do K parallel passes and the recurrence agree, for every K, after quantisation?
``long-run``            long_run        Does the error grow over twenty thousand tokens?
======================  ==============  ==========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.model import Model
from crt_export.parity.case import ParityCase
from crt_export.parity.metrics import AT_LEAST, AT_MOST, WITHIN, Check, failed_check, json_value
from crt_export.parity.reference import Reference
from crt_export.parity.report import LevelResult
from crt_export.parity.runner import Runner, Runners
from crt_export.parity.tolerances import Tolerance, Tolerances
from crt_export.parity.windows import ParityOptions, Windows
from crt_export.progress import Progress
from crt_export.text import TokenText

__all__ = [
    "AT_LEAST",
    "AT_MOST",
    "WITHIN",
    "Check",
    "LevelResult",
    "ParitySetup",
    "failed_check",
    "json_value",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class ParitySetup:
    """What every level is given besides the target.

    Attributes:
        checkpoint: The weights of the reference.
        reference: PyTorch FP32 on the windows; computes each regime once and keeps it.
        text: The held-out text that the windows are the start of.
        options: How much to measure.
        tolerances: The limits.
        progress: Told what runs.
        saved_outputs: Where the one-step level saves its tensors for Polygraphy's tools; None saves nothing.
        recorded_nll: How well the reference predicted the text of the bundle's own report, nats per token; None where
            there is no such report.
    """

    checkpoint: Checkpoint
    reference: Reference
    text: TokenText
    options: ParityOptions
    tolerances: Tolerances
    progress: Progress
    saved_outputs: Path | None = None
    recorded_nll: float | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.checkpoint.config

    @property
    def model(self) -> Model:
        """PyTorch FP32, in evaluation mode."""
        return self.reference.model

    @property
    def windows(self) -> Windows:
        """Consecutive windows of the text."""
        return self.reference.windows

    @property
    def threads(self) -> int:
        """CPU threads. PyTorch's count honours OMP_NUM_THREADS, so that checks side by side do not fight for cores."""
        return self.options.threads or torch.get_num_threads()

    @cached_property
    def runners(self) -> Runners:
        """The deployed engines of the targets, loaded when a level first asks for one."""
        return Runners(self.config, self.threads)

    def runner(self, case: ParityCase) -> Runner:
        """The deployed engine of a target.

        Raises:
            BundleError: A file is missing or differs from what was built.
            ContractError: A graph cannot be loaded or breaks the contract.
        """
        return self.runners.of(case)

    def limits(self, precision: str) -> Tolerance:
        """The limits of one precision."""
        return self.tolerances.precisions[precision]
