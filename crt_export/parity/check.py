"""Compare every target with PyTorch FP32, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import ContractError, InputError
from crt_export.model import model_from_checkpoint
from crt_export.parity.corpus import check_corpus
from crt_export.parity.levels import CONTRACT, CORPUS, LEVELS, LONG_RUN, OWN_MODEL, level_function
from crt_export.parity.long_run.schedule import check_length
from crt_export.parity.metrics import failed_check
from crt_export.parity.own_model import not_compared
from crt_export.parity.reference import HANDOVER, PREFILL, STEP, Reference
from crt_export.parity.report import LevelResult, ParityReport, reference_facts
from crt_export.parity.scores import reference_nll
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.parity.statistics import METHOD
from crt_export.parity.text_gate import check_text
from crt_export.parity.tolerances import Tolerances, load_tolerances
from crt_export.parity.windows import ParityOptions, Windows, windows_from_text
from crt_export.progress import Progress, Stages, no_progress
from crt_export.text import TokenText


def check_parity(
    checkpoint: Checkpoint,
    cases: Sequence[ParityCase],
    text: TokenText,
    *,
    options: ParityOptions | None = None,
    tolerances: Tolerances | None = None,
    saved_outputs: Path | None = None,
    recorded_nll: float | None = None,
    own_model: LevelResult | None = None,
    progress: Progress = no_progress,
) -> ParityReport:
    """Take every target up the ladder, see :mod:`crt_export.parity.levels`.

    Args:
        checkpoint: The reference, read by :func:`crt_export.checkpoint.load_checkpoint`.
        cases: The targets.
        text: Held-out text; none of it may have been calibrated on.
        options: Which levels, and how much to measure.
        tolerances: Limits; None reads ``validate/tolerances.toml``.
        saved_outputs: Folder for the tensors of the one-step level, in the format of Polygraphy's tools.
        recorded_nll: How well PyTorch FP32 predicted the text that the bundle was built on, nats per token; a text it
            predicts worse than a uniform guess is then refused as not the model's.
        own_model: What the comparison of the reference with the user's own model found
            (:func:`crt_export.parity.own_model.check_own_model`); None: it was not made, and the report says so.
        progress: Told what runs and how many windows are done.

    Returns:
        The report; ``passed`` says whether every gate held. A graph that cannot run is a failed level, not an error.

    Raises:
        InputError: There is no target, or the text is too short.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    if not cases:
        raise InputError("parity needs at least one target")
    options = options or ParityOptions()
    if LONG_RUN in options.levels:  # the last level: nobody waits for the others to learn that the text is too short
        check_length(text, options.long_run_tokens)
    windows = windows_from_text(text, options, **_longest_window(cases, checkpoint.config))
    levels = [level for level in LEVELS if level in options.levels and level != OWN_MODEL]
    stages = Stages(progress, len(levels), "level")
    setup = ParitySetup(
        checkpoint=checkpoint,
        reference=Reference(model_from_checkpoint(checkpoint), windows, batch=options.window_batch),
        text=text,
        options=options,
        tolerances=tolerances or load_tolerances(),
        progress=stages,
        saved_outputs=saved_outputs,
        recorded_nll=recorded_nll,
    )
    results = [own_model or not_compared(), *_climb_ladder(levels, cases, setup, stages)]
    return ParityReport(
        levels=tuple(results),
        tolerances=setup.tolerances.to_dict(),
        text=_text_identity(windows),
        notes=tuple(dict.fromkeys((*windows.notes, *(note for result in results for note in result.notes)))),
        method=METHOD,
        **reference_facts(checkpoint),
    )


def _climb_ladder(
    levels: Sequence[str], cases: Sequence[ParityCase], setup: ParitySetup, stages: Stages
) -> list[LevelResult]:
    """Every level that was asked for, all targets of one before the next."""
    results: list[LevelResult] = []
    for level in levels:
        stages.begin()
        if level == CORPUS:
            _prepare_reference(cases, setup)
            results += check_corpus(cases, setup)
        else:
            results += [_climb(level, case, setup) for case in cases]
    text_matters = setup.recorded_nll is not None and set(setup.options.levels) != {CONTRACT}
    if text_matters and CORPUS not in setup.options.levels:  # which judges the text itself
        setup.progress("PyTorch FP32: text", 0, setup.windows.count)
        results.append(check_text(setup, float(reference_nll(setup.reference, STEP, 1).mean())))
    return results


def _climb(level: str, case: ParityCase, setup: ParitySetup) -> LevelResult:
    """One level of one target; a graph that breaks its contract fails the level with that sentence."""
    setup.progress(f"{case.target}: {level}", 0, 0)
    try:
        return level_function(level)(case, setup)
    except ContractError as error:
        return LevelResult(level=level, target=case.target, checks=(failed_check("runs", str(error)),))


def _prepare_reference(cases: Sequence[ParityCase], setup: ParitySetup) -> None:
    """PyTorch FP32's hidden states in every regime that a target will be compared in."""
    for regime in (STEP, PREFILL, HANDOVER):
        setup.progress(f"PyTorch FP32: {regime}", 0, setup.windows.count)
        for passes in sorted({case.unroll for case in cases}):
            setup.reference.hidden(regime, passes)


def _longest_window(cases: Sequence[ParityCase], config: ModelConfig) -> dict:
    """The longest window that every target can take, and what says so."""
    limits = {"max_position_embeddings of the model": config.max_position_embeddings}
    limits |= {f"capacity of {case.target}": case.room(config) for case in cases}
    limits |= {f"longest prefill call of {case.target}": case.chunk for case in cases if case.chunk is not None}
    reason = min(limits, key=lambda name: limits[name])
    return {"longest": limits[reason], "longest_reason": f"{reason} is {limits[reason]}"}


def _text_identity(windows: Windows) -> dict:
    return {
        "source": windows.text.source,
        "sha256": windows.text.sha256,
        "offset": windows.text.offset,
        "tokens": len(windows.text),
        "windows": windows.count,
        "window": windows.length,
    }
