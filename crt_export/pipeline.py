"""The main job, from a checkpoint to a validated bundle: read this file first.

::

    folder --load_checkpoint--> Checkpoint --write_graphs--> graphs/*.onnx --build_targets--> engines/
           --Staging.complete--> BundleFiles --check_parity--> ParityReport --Staging.commit--> bundle

Before the first graph, PyTorch FP32 is compared with the user's own model, where there is a file of what that gives.
Every stage works in a staging folder beside the output. The bundle there is complete but for its verdict when the
evidence opens it, as an application would, and only one whose report passed takes the output's place. An error, Ctrl-C
or a crash at any point leaves what was there.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from crt_export.bundle import BundleFiles, stage_bundle
from crt_export.checkpoint import Checkpoint, copy_checkpoint, copy_tokenizer, load_checkpoint
from crt_export.errors import ParityError, problem_list
from crt_export.folders import sweep_abandoned
from crt_export.parity import ParityReport, check_parity
from crt_export.parity.check import REFERENCE_FOLDER, case_from_manifest
from crt_export.parity.own_model import require_own_model
from crt_export.parity.report import LevelResult
from crt_export.progress import Progress, Stages, no_progress
from crt_export.stages.calibration import quantization_plan, read_build_text
from crt_export.stages.graphs import write_graphs
from crt_export.stages.manifest import REPORT_FILE, manifest_from_build
from crt_export.stages.options import BuildOptions, profiles_from_options
from crt_export.stages.prefill import prefill_plans
from crt_export.stages.store import StageStore
from crt_export.stages.targets import BuiltTarget, build_targets
from crt_export.stages.vectors import write_vectors
from crt_export.text import TokenText
from crt_export.tokenizer import load_tokenizer

__all__ = ["BuildOptions", "BuildResult", "build"]


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a build made: where it is, its targets, and how they agree with PyTorch (None: not validated)."""

    path: Path
    targets: tuple[BuiltTarget, ...]
    report: ParityReport | None


def build(options: BuildOptions, *, progress: Progress = no_progress) -> BuildResult:
    """Take a checkpoint to a bundle.

    Raises:
        CheckpointError: The checkpoint is unusable; InputError: text, targets or an option is.
        UnsupportedError: The model or a target needs what this version cannot do.
        MissingDependencyError: A package or device that a target needs is absent.
        BuildError: An export, a quantisation pass or an engine failed.
        ParityError: A target does not agree with PyTorch, or PyTorch with the user's own model; nothing is written.
        BundleError: The output cannot be written.
    """
    sweep_abandoned()
    progress = stages = Stages(progress, 8 if options.validated else 7)
    stages.begin()
    store = StageStore(folder=options.cache, note=lambda sentence: progress(sentence, 0, 0))
    progress("read the checkpoint", 0, 0)
    checkpoint = load_checkpoint(options.checkpoint)
    # Also for a build without text: the bundle carries the tokenizer, and its ids must have embeddings.
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
    profiles = profiles_from_options(options, checkpoint.config)
    own_model = require_own_model(checkpoint, options.expect, progress)
    stages.begin()
    text = read_build_text(checkpoint, tokenizer, profiles, options, progress)
    with stage_bundle(options.output) as staging:
        prefills = prefill_plans(checkpoint, profiles, text.validation, progress)
        stages.begin()
        plan, calibration = quantization_plan(checkpoint, profiles, text.calibration, progress, store)
        stages.begin()
        graphs = write_graphs(checkpoint, profiles, plan, staging.path, progress, store)
        stages.begin()
        targets = build_targets(profiles, graphs, checkpoint.config, staging.path, progress, store)
        for target in targets:
            staging.digests.update(target.digests)
        copy_tokenizer(checkpoint, staging.path)
        if options.reference:
            copy_checkpoint(checkpoint, staging.path / REFERENCE_FOLDER)
        stages.begin()
        write_vectors(checkpoint, tokenizer, profiles, text.validation, plan, staging.path, progress)
        manifest = partial(
            manifest_from_build,
            checkpoint,
            options,
            text=text.identity,
            calibration=calibration,
            targets=targets,
            prefills=prefills,
        )
        report = None
        if options.validated and text.validation is not None:
            stages.begin()
            progress("complete the bundle", 0, 0)
            with closing(staging.complete(manifest(report=None))) as files:
                report = _validated(files, checkpoint, text.validation, own_model, options, progress)
            (staging.path / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        stages.begin()
        progress("write the bundle", 0, 0)
        staging.commit(manifest(report=report))
    return BuildResult(path=options.output, targets=targets, report=report)


def _validated(
    files: BundleFiles,
    checkpoint: Checkpoint,
    text: TokenText,
    own_model: LevelResult,
    options: BuildOptions,
    progress: Progress,
) -> ParityReport:
    cases = [case_from_manifest(files, name) for name in files.manifest["targets"]]
    report = check_parity(checkpoint, cases, text, options=options.parity, own_model=own_model, progress=progress)
    files.check_unchanged()
    if not report.passed:
        heading = "the built graphs do not agree with PyTorch FP32, no bundle was written"
        raise ParityError(problem_list(heading, report.failures), report.to_dict())
    return report
