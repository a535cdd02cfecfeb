"""Setups of levels on a few short windows, and the checks of what a level found."""

from __future__ import annotations

from crt_export.checkpoint import Checkpoint
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity import ParityOptions
from crt_export.parity.metrics import Check
from crt_export.parity.reference import Reference
from crt_export.parity.report import LevelResult
from crt_export.parity.setup import ParitySetup
from crt_export.parity.tolerances import load_tolerances
from crt_export.parity.windows import windows_from_text
from crt_export.progress import no_progress
from crt_export.text import TokenText


def short_setup(
    checkpoint: Checkpoint,
    text: TokenText,
    options: ParityOptions,
    *,
    model: LanguageModel | None = None,
    recorded_nll: float | None = None,
) -> ParitySetup:
    """What a level is given: the windows of the options, however long, and a reference with or without its own model.

    Args:
        checkpoint: What the bundle was built from.
        text: What to validate on.
        options: Its windows are taken as they are.
        model: The reference's; None for that of the checkpoint.
        recorded_nll: What the bundle's report says of the reference.
    """
    windows = windows_from_text(text, options, longest=options.window, longest_reason="")
    return ParitySetup(
        checkpoint=checkpoint,
        reference=Reference(model or model_from_checkpoint(checkpoint), windows, batch=options.window_batch),
        text=text,
        options=options,
        tolerances=load_tolerances(),
        progress=no_progress,
        recorded_nll=recorded_nll,
    )


def check_of(result: LevelResult, start: str) -> Check:
    """The check of this name, else the first whose name starts so."""
    named = [check for check in result.checks if check.name.startswith(start)]
    return next((check for check in named if check.name == start), named[0])
