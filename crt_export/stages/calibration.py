"""Stage: the text of a build, and from its first part the quantisation of w8a8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.folders import temporary_folder
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity.windows import windows_from_text
from crt_export.profile import EngineProfile
from crt_export.progress import Progress, no_progress
from crt_export.quantize.calibration import CalibrationOptions, calibrate, calibration_windows
from crt_export.quantize.plan import W8A8Plan, plan_w8a8, read_plan
from crt_export.stages.options import BuildOptions
from crt_export.stages.store import NO_STORE, StageStore, stage_key
from crt_export.text import TokenText, read_text, split_text
from crt_export.tokenizer import Tokenizer

_STAGE, _PLAN_FILE = "calibration", "plan.safetensors"
_LONGEST_WINDOW = 256
#: The sample of a model above the first number is full with far fewer rows than this many tokens give, as every token
#: is seen in K passes and decoding: 4,096 give 24,576 rows at K = 5, of which 3,571 of width 1120 are kept.
_LARGE_MODEL, _TOKENS_OF_LARGE_MODEL = 20_000_000, 4096


@dataclass(frozen=True, kw_only=True)
class BuildText:
    """The text of a build in two parts that never overlap.

    Attributes:
        calibration: For w8a8; None when no target needs it.
        validation: For parity; None for an unvalidated build.
        identity: Name and content hash of the whole text, for the manifest; None when no stage needs text.
    """

    calibration: TokenText | None
    validation: TokenText | None
    identity: dict[str, str] | None


def read_build_text(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    profiles: Sequence[EngineProfile],
    options: BuildOptions,
    progress: Progress = no_progress,
) -> BuildText:
    """Read and split the text, if any stage needs it.

    Raises:
        InputError: The text is unreadable, too short or not for this model.
    """
    needs_calibration = any(profile.precision == "w8a8" for profile in profiles)
    if not needs_calibration and not options.validated:
        return BuildText(calibration=None, validation=None, identity=None)
    given = options.text or options.tokens
    if given is None:
        progress("no --text given: the packaged default text is used", 0, 0)
    whole = read_text(checkpoint.config, tokenizer, text=options.text, tokens=options.tokens)
    calibration, validation = split_text(
        whole,
        calibrate=needs_calibration,
        validate=options.validated,
        validation_tokens=options.parity.validation_tokens,
    )
    if options.validated:
        _check_windows(validation, profiles, checkpoint.config, options)
    return BuildText(
        calibration=calibration,
        validation=validation if options.validated else None,
        # The name alone: a folder means nothing on another machine.
        identity={"name": "default text" if given is None else given.name, "sha256": whole.sha256},
    )


def _check_windows(
    text: TokenText, profiles: Sequence[EngineProfile], config: ModelConfig, options: BuildOptions
) -> None:
    """Cut the parity windows once before any work, because a text too short for them would fail the last stage."""
    capacities = [profile.capacity for profile in profiles]
    windows_from_text(
        text,
        options.parity,
        longest=min([config.max_position_embeddings, *capacities]),
        longest_reason="the smallest capacity or max_position_embeddings",
    )


def quantization_plan(
    checkpoint: Checkpoint,
    profiles: Sequence[EngineProfile],
    text: TokenText | None,
    progress: Progress,
    store: StageStore = NO_STORE,
) -> tuple[W8A8Plan | None, dict[str, Any] | None]:
    """Calibrate w8a8 on text; what was done goes into the manifest.

    Args:
        checkpoint: The model.
        profiles: Resolved targets.
        text: What to calibrate on.
        progress: Told what is done.
        store: Where a plan for the same model and text may lie.

    Returns:
        The plan and a record of it, or (None, None) when no target needs one.

    Raises:
        InputError: The text is too short, or no text at all.
        UnsupportedError: Folded values do not fit into FP16.
    """
    unrolls = [profile.unroll or 1 for profile in profiles if profile.precision == "w8a8"]
    if not unrolls or text is None:
        return None, None
    inputs = {
        "checkpoint": checkpoint.sha256,
        "text": [text.sha256, text.offset],
        "unroll": max(unrolls),
    }
    key = stage_key(_STAGE, inputs)
    with temporary_folder() as folder:
        stored = store.restore_as(
            _STAGE, key, folder, lambda answer: (read_plan(folder / _PLAN_FILE, checkpoint.config), answer["record"])
        )
        if stored is not None:
            progress("calibrate w8a8: as stored by an earlier build", 0, 0)
            return stored
        plan, record = _calibrated(checkpoint, text, max(unrolls), progress)
        if store.folder is not None:
            (folder / _PLAN_FILE).write_bytes(plan.to_bytes())
            store.keep(_STAGE, key, folder, [_PLAN_FILE], {"record": record})
    return plan, record


def _calibrated(
    checkpoint: Checkpoint, text: TokenText, unroll: int, progress: Progress
) -> tuple[W8A8Plan, dict[str, Any]]:
    config = checkpoint.config
    seq = min(config.training_sequence_length or _LONGEST_WINDOW, config.max_position_embeddings)
    options = CalibrationOptions()
    if config.parameter_count > _LARGE_MODEL:
        options = CalibrationOptions(windows=max(1, _TOKENS_OF_LARGE_MODEL // seq))
    windows = calibration_windows(text.ids, seq=seq, options=options, bos=text.bos_token_id)
    model = model_from_checkpoint(checkpoint)
    statistics = calibrate(model, windows, unroll=unroll, options=options, progress=progress)
    plan = plan_w8a8(model, statistics)
    record = {
        "sha256": text.sha256,
        "offset": text.offset,
        "tokens": len(text),
        "windows": list(windows.shape),
        "unroll": statistics.unroll,
        "evidence": {"repetition": statistics.evidence.repetition, "dependence": statistics.evidence.dependence},
    }
    return plan, record
