"""Compare every target with PyTorch FP32, level by level: as a build does, and again, of any bundle, anywhere."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crt_export.bundle import BundleFiles, open_bundle
from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import BundleError, ContractError, InputError
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity.corpus import check_corpus, check_text
from crt_export.parity.levels import CONTRACT, CORPUS, LEVELS, LONG_RUN, OWN_MODEL, level_function
from crt_export.parity.long_run.schedule import check_length
from crt_export.parity.metrics import failed_check
from crt_export.parity.own_model import check_own_model, not_compared, own_model_report
from crt_export.parity.reference import HANDOVER, PREFILL, STEP, Reference
from crt_export.parity.report import LevelResult, ParityReport, reference_facts
from crt_export.parity.runner import disabled_optimizers, open_runner
from crt_export.parity.scores import reference_nll
from crt_export.parity.setup import ParityCase, ParitySetup, TargetGraphs
from crt_export.parity.statistics import METHOD
from crt_export.parity.tolerances import Tolerances, load_tolerances
from crt_export.parity.windows import ParityOptions, windows_from_text
from crt_export.profile import EngineProfile
from crt_export.progress import Progress, Stages, no_progress
from crt_export.quantize.plan import W8A8Plan, read_plan
from crt_export.report.reading import report_of_bundle
from crt_export.report.verdict import own_model_text, was_compared
from crt_export.text import TokenText, read_text
from crt_export.tokenizer import load_tokenizer

REFERENCE_FOLDER = "reference"


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
    """Check every target at every level, see :mod:`crt_export.parity.levels`.

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
    longest, reason = _longest_window(cases, checkpoint.config)
    windows = windows_from_text(text, options, longest=longest, longest_reason=reason)
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
    results = [own_model or not_compared(), *_check_levels(levels, cases, setup, stages)]
    return ParityReport(
        levels=tuple(results),
        tolerances=setup.tolerances.to_dict(),
        text={
            "source": windows.text.source,
            "sha256": windows.text.sha256,
            "offset": windows.text.offset,
            "tokens": len(windows.text),
            "windows": windows.count,
            "window": windows.length,
        },
        notes=tuple(dict.fromkeys((*windows.notes, *(note for result in results for note in result.notes)))),
        method=METHOD,
        **reference_facts(checkpoint),
    )


def _check_levels(
    levels: Sequence[str], cases: Sequence[ParityCase], setup: ParitySetup, stages: Stages
) -> Iterator[LevelResult]:
    """Every level that was asked for, all targets of one before the next."""
    for level in levels:
        stages.begin()
        if level == CORPUS:
            for regime in (STEP, PREFILL, HANDOVER):  # every hidden state that a target will be compared in
                setup.progress(f"PyTorch FP32: {regime}", 0, setup.windows.count)
                for passes in sorted({case.unroll for case in cases}):
                    setup.reference.hidden(regime, passes)
            yield from check_corpus(cases, setup)
            continue
        for case in cases:
            setup.progress(f"{case.target}: {level}", 0, 0)
            try:
                yield level_function(level)(case, setup)
            except ContractError as error:  # a graph that breaks its contract fails the level with that sentence
                yield LevelResult(level=level, target=case.target, checks=(failed_check("runs", str(error)),))
    if setup.recorded_nll is not None and CORPUS not in levels and {*setup.options.levels} != {CONTRACT}:
        setup.progress("PyTorch FP32: text", 0, setup.windows.count)  # which the corpus level judges itself
        yield check_text(setup, float(reference_nll(setup.reference, STEP, 1).mean()))


def _longest_window(cases: Sequence[ParityCase], config: ModelConfig) -> tuple[int, str]:
    """The longest window that every target can take, and what says so."""
    limits = {"max_position_embeddings of the model": config.max_position_embeddings}
    limits |= {f"capacity of {case.target}": case.room(config) for case in cases}
    limits |= {f"longest prefill call of {case.target}": case.chunk for case in cases if case.chunk is not None}
    reason = min(limits, key=lambda name: limits[name])
    return limits[reason], f"{reason} is {limits[reason]}"


# --- a bundle
def validate_bundle(
    path: str | os.PathLike[str],
    *,
    text: Path | None = None,
    tokens: Path | None = None,
    targets: Sequence[str] = (),
    checkpoint: Path | None = None,
    options: ParityOptions | None = None,
    tolerances: Tolerances | None = None,
    saved_outputs: Path | None = None,
    expect: Path | None = None,
    progress: Progress = no_progress,
) -> ParityReport:
    """Compare every graph of a bundle that runs here with PyTorch FP32.

    An unvalidated bundle may be given: this is how to find out whether it agrees. Text that the bundle was calibrated
    on is left out where the bundle's own report tells which part that was.

    Args:
        path: The bundle.
        text: A UTF-8 file of held-out text.
        tokens: A .npy file of held-out token ids; without either, the text that comes with the package.
        targets: Names of targets; empty is all of them.
        checkpoint: The checkpoint the bundle was built from, for a bundle without one or to use another copy.
        options: How much to measure.
        tolerances: Limits; None reads ``validate/tolerances.toml``.
        saved_outputs: Folder for the tensors of the one-step level; None saves nothing.
        expect: What the user's own model gave (:mod:`crt_export.parity.expected_outputs`), to compare the reference
            with; None: the report says that it was not compared.
        progress: Told how far it is.

    Returns:
        The report, whether it passed or not.

    Raises:
        BundleError: The bundle is unusable, a file was changed, it has no reference and no checkpoint is given, or it
            has a target of w8a8 and no plan of it.
        InputError: An unknown target, a checkpoint the bundle was not built from, unusable text or expected outputs.
        CheckpointError: The checkpoint is unusable.
    """
    files = open_bundle(path, allow_unvalidated=True)
    cases = [case_from_manifest(files, name) for name in _chosen(files, targets)]
    reference = _reference(files, checkpoint)
    levels = (options or ParityOptions()).levels
    if expect is None and OWN_MODEL in levels:
        raise InputError(f"the level {OWN_MODEL} needs the outputs of your own model (--expect FILE.safetensors)")
    recorded = report_of_bundle(files)
    own_model = not_compared(own_model_text(recorded) if was_compared(recorded) else "")
    if expect is not None:
        own_model = check_own_model(reference, expect, tolerances=tolerances, progress=progress)
        if set(levels) == {OWN_MODEL}:
            return own_model_report(reference, expect, own_model, tolerances)
    tokenizer = load_tokenizer(reference.path, reference.config)
    whole = read_text(reference.config, tokenizer, text=text, tokens=tokens)
    held_out = held_out_text(whole, recorded, files.manifest["options"].get("calibration"))
    report = check_parity(
        reference,
        cases,
        held_out,
        options=options,
        tolerances=tolerances,
        saved_outputs=saved_outputs,
        recorded_nll=_recorded_nll(recorded),
        own_model=own_model,
        progress=progress,
    )
    files.check_unchanged()  # its graphs were opened by their names, some of them minutes after they were hashed
    return report


def case_from_manifest(files: BundleFiles, name: str) -> ParityCase:
    """One target of a bundle, every file it needs checked; the one way from a bundle to what is compared."""
    target = files.manifest["targets"][name]
    try:
        profile = EngineProfile.from_dict(target["profile"], source=f"{name} of {files.path}")
    except InputError as error:
        raise BundleError(str(error)) from error
    for file in (*target["engines"].values(), *target["graphs"].values()):
        files.check(file)
    return ParityCase(
        target=profile.name,
        runtime=profile.runtime,
        precision=profile.precision,
        graphs=TargetGraphs(files, target["graphs"]),
        unroll=target["unroll"] or 1,
        cache_dtype=profile.cache_dtype,
        # The graphs of a compiled target are fixed to its capacity; those that ONNX Runtime deploys leave it open.
        capacity=target["capacity"] if profile.compiled else None,
        built_for=target["capacity"],
        chunk=profile.seq.max,
        residual_dtype=profile.residual_dtype,
        compiled=tuple(target["engines"]),
        disabled_optimizers=disabled_optimizers(profile),
        opener=partial(open_runner, files, name),
        plan=_plan(files, name) if profile.precision == "w8a8" else None,
    )


def _plan(files: BundleFiles, target: str) -> W8A8Plan:
    manifest = files.manifest
    if "w8a8" not in manifest["quantization"]:
        raise BundleError(
            f"{files.path}: target {target} is w8a8, expected the file of its plan in 'quantization' of the manifest, "
            "found none: the INT8 weights cannot be compared with the checkpoint; build it again"
        )
    return read_plan(files.file(manifest["quantization"]["w8a8"]), ModelConfig.from_dict(manifest["config"]))


def _chosen(files: BundleFiles, targets: Sequence[str]) -> list[str]:
    known = list(files.manifest["targets"])
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise InputError(
            f"unknown target {', '.join(map(repr, unknown))}: {files.path} was built for {', '.join(known) or '(none)'}"
        )
    if not known:
        raise BundleError(f"{files.path} has no target, so there is nothing to validate; build it again")
    return [name for name in known if not targets or name in targets]


def _reference(files: BundleFiles, folder: Path | None) -> Checkpoint:
    """The bundle's own checkpoint, or one given that must be the same."""
    expected = files.manifest["checkpoint"]["sha256"]
    if folder is None:
        present = [name for name in files.names if name.startswith(f"{REFERENCE_FOLDER}/")]
        if not present:
            raise BundleError(
                f"{files.path} was built without its reference (--no-reference): give the checkpoint it was built from "
                f"with --checkpoint DIR (content hash {expected})"
            )
        for name in present:
            files.file(name)
    checkpoint = load_checkpoint(files.path / REFERENCE_FOLDER if folder is None else folder)
    if checkpoint.sha256 != expected:
        raise InputError(
            f"{checkpoint.path}: content hash {checkpoint.sha256} is not that of the checkpoint {files.path} was built "
            f"from, {expected}: give the very checkpoint"
        )
    return checkpoint


def held_out_text(whole: TokenText, report: ParityReport | None, calibration: Mapping[str, Any] | None) -> TokenText:
    """The part of a text that a bundle was not calibrated on.

    Args:
        whole: The text to validate on.
        report: The bundle's, which names the part that was validated on; None where it has none.
        calibration: What the bundle's options say of the part that was calibrated on.
    """
    validated = _recognised(None if report is None else report.text, whole)
    if validated is not None:
        return validated
    calibrated = _recognised(calibration, whole)
    if calibrated is None:
        return whole
    # Build calibrates on the start of its text.
    end = calibrated.offset + len(calibrated)
    return dataclasses.replace(whole, ids=np.ascontiguousarray(whole.ids[end:]), offset=end)


def _recorded_nll(report: ParityReport | None) -> float | None:
    """How well PyTorch FP32 predicted the bundle's validation text token by token, nats; None without a report."""
    rows = () if report is None else report.rows
    return next((row.reference_nll for row in rows if row.regime == STEP and row.reference_nll is not None), None)


def _recognised(record: Mapping[str, Any] | None, whole: TokenText) -> TokenText | None:
    """The part of a text that a record of offset, tokens and sha256 describes, if it is that text."""
    if not record:
        return None
    offset, count = int(record.get("offset", 0)), int(record.get("tokens", 0))
    part = dataclasses.replace(whole, ids=np.ascontiguousarray(whole.ids[offset : offset + count]), offset=offset)
    return part if len(part) and part.sha256 == record.get("sha256") else None
