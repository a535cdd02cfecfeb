"""Level ``own-model``: does this package's PyTorch model compute what the user's own one does?

Every other level compares the deployed form with :mod:`crt_export.model`, so a wrong word in ``config.json`` passes all
of them: both sides read it. This level compares :mod:`crt_export.model` in FP32 with logits that the user's own model
gave (``--expect``). The figure is the largest |difference| of any logit at any position, over the standard deviation of
a position's expected logits (mean over the positions): the largest, because one token that sees a wrong key is a fault
and a mean over many that do not would hide it.

A CRT has two regimes, the exact recurrence and K parallel passes. The file's metadata ``passes`` says which one it is
of; where it does not, the recurrence is tried and then the checkpoint's ``unroll_steps``, and the result names which
one agreed.

Agreement is to rounding or it has a cause. Where a difference within the limit is more than rounding, and another word
in ``config.json`` makes it ten times smaller, that word is wrong and the check ``config.json`` fails; another cause is
noted.

``data``: ``sha256`` of the file, ``positions``, ``passes`` compared with, ``deviation`` of the logits,
``first_position`` that differs (None: none does), ``differences`` by position (largest of each block where there are
more than 256), and ``cause`` (``words``, ``advice``, ``before``, ``after``; None where none was found or needed).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crt_export.checkpoint import Checkpoint
from crt_export.errors import ParityError, problem_list
from crt_export.model import Model, model_from_checkpoint
from crt_export.parity.expected_outputs import (
    EXACT,
    ExpectedOutputs,
    Passes,
    hidden_differences,
    logit_differences,
    read_expected_outputs,
    run_model,
)
from crt_export.parity.levels import NOT_COMPARED, OWN_MODEL, WHEN_BUILT
from crt_export.parity.metrics import Check, measured
from crt_export.parity.own_model_causes import Cause, Search, facts, head_fact
from crt_export.parity.report import LevelResult, ParityReport, reference_facts
from crt_export.parity.tolerances import Tolerances, load_tolerances
from crt_export.progress import Progress, no_progress

TARGET = "pytorch-fp32"
TOLERANCE = "shared.own_model_error"
#: Sums in another order stay below this (measured 2e-6); what passes the gate above it is looked into all the same.
_ROUNDING = 3e-5
_FEW_POSITIONS = 64
_BLOCKS = 256


@dataclass(frozen=True, kw_only=True)
class _Run:
    """This package's model in one regime."""

    passes: Passes
    h: Tensor
    differences: Tensor

    @property
    def worst(self) -> float:
        return float(self.differences.amax())


def not_compared(recorded: str = "") -> LevelResult:
    """The level where there is nothing to compare with.

    Args:
        recorded: What an earlier report of the same checkpoint says; empty where it says nothing.
    """
    note = (
        f"{NOT_COMPARED}: agreement is with this package's PyTorch model of config.json; --expect FILE.safetensors "
        "compares that with yours"
    )
    return LevelResult(
        level=OWN_MODEL,
        target=TARGET,
        checks=(Check(name="logits"),),
        notes=(note, *([f"{WHEN_BUILT}: {recorded}"] if recorded else ())),
    )


def check_own_model(
    checkpoint: Checkpoint, path: Path, *, tolerances: Tolerances | None = None, progress: Progress = no_progress
) -> LevelResult:
    """Compare this package's PyTorch model with what the user's own model gave.

    Args:
        checkpoint: The checkpoint.
        path: The file of expected outputs.
        tolerances: Limits; None reads ``validate/tolerances.toml``.
        progress: Told what runs.

    Raises:
        InputError: The file is unusable; lists all problems.
    """
    expected = read_expected_outputs(path, checkpoint.config)
    limit = (tolerances or load_tolerances()).own_model_error
    progress("compare with your own model", 0, 0)
    model = model_from_checkpoint(checkpoint)
    run = _agreeing_run(model, expected, limit)
    first = next(iter((~(run.differences <= limit)).nonzero().flatten().tolist()), None)
    search = Search(
        checkpoint=checkpoint,
        expected=expected,
        passes=run.passes,
        before=run.worst,
        first=first or 0,
        limit=limit,
        progress=progress,
    )
    cause, sentences, notes = None, [], [*_notes(run, expected, checkpoint)]
    if first is not None:
        cause, explanation = _explanation(search, model, run)
        sentences = [_failure(run, first, limit, expected), *explanation]
    elif run.worst > _ROUNDING:
        nearer = search.single()
        if nearer is not None and nearer.after <= run.worst / 10:
            cause = nearer
            notes.append(f"your own model agrees within the limit, and not as closely as rounding: {cause.sentence}")
    checks = [_logits_check(run, limit, sentences)]
    if first is None and cause is not None and cause.in_config:
        checks.append(Check(name="config.json", passed=False, failures=(cause.sentence,)))
    if expected.hidden is not None:
        checks.append(_hidden_check(model, run, expected, limit))
    return LevelResult(
        level=OWN_MODEL,
        target=TARGET,
        checks=tuple(checks),
        data=_data(run, expected, first, cause),
        notes=tuple(notes),
    )


def require_own_model(checkpoint: Checkpoint, path: Path | None, progress: Progress = no_progress) -> LevelResult:
    """:func:`check_own_model` before a build goes on; without a file, :func:`not_compared`.

    Raises:
        InputError: The file is unusable.
        ParityError: The models do not agree; its report holds this level alone.
    """
    if path is None:
        return not_compared()
    result = check_own_model(checkpoint, path, progress=progress)
    if not result.passed:
        heading = "your own model and this package's do not agree, no bundle was written"
        raise ParityError(problem_list(heading, result.failures), own_model_report(checkpoint, path, result).to_dict())
    return result


def own_model_report(
    checkpoint: Checkpoint, path: Path, result: LevelResult, tolerances: Tolerances | None = None
) -> ParityReport:
    """A report of this level alone; its text are the tokens of the file."""
    count = result.data["positions"]
    return ParityReport(
        levels=(result,),
        tolerances=(tolerances or load_tolerances()).to_dict(),
        text={
            "source": str(path),
            "sha256": result.data["sha256"],
            "offset": 0,
            "tokens": count,
            "windows": 1,
            "window": count,
        },
        notes=result.notes,
        **reference_facts(checkpoint),
    )


def _agreeing_run(model: Model, expected: ExpectedOutputs, limit: float) -> _Run:
    """The regime that the file names; where it names none, the first that agrees, or the recurrence."""
    regimes: tuple[Passes, ...] = (EXACT, model.config.unroll_steps) if model.config.recurrent else (EXACT,)
    runs = []
    for passes in regimes if expected.passes is None else (expected.passes,):
        h = run_model(model, expected.input_ids, passes)
        runs.append(_Run(passes=passes, h=h, differences=logit_differences(model, h, expected)))
        if runs[-1].worst <= limit:
            return runs[-1]
    return runs[0]


def regime_text(passes: Passes) -> str:
    """A regime in words."""
    return "the exact recurrence" if passes == EXACT else f"{passes} parallel pass{'es' * (passes != 1)}"


def _notes(run: _Run, expected: ExpectedOutputs, checkpoint: Checkpoint) -> Iterator[str]:
    config = checkpoint.config
    if expected.positions < _FEW_POSITIONS:
        yield (
            f"your own model was compared on {expected.positions} tokens only: {_FEW_POSITIONS} and more show a wrong "
            "rope_theta or sliding_window better"
        )
    if config.recurrent and run.passes not in (EXACT, config.unroll_steps):
        yield (
            f"your own model's logits are those of {regime_text(run.passes)}; the deployment runs the recurrence, and "
            f"{config.unroll_steps} passes where it prefills (unroll_steps): their gap is in the report"
        )


def _failure(run: _Run, first: int, limit: float, expected: ExpectedOutputs) -> str:
    return (
        f"your model's logits and those of this package's model ({regime_text(run.passes)}) differ by {run.worst:.3g} "
        f"of their standard deviation, expected at most {limit:g} ({TOLERANCE}), first at position {first} of "
        f"{expected.positions}"
    )


def _explanation(search: Search, model: Model, run: _Run) -> tuple[Cause | None, list[str]]:
    """What explains a difference, and the sentences that say so or narrow it down."""
    cause = search.single()
    head = "" if cause else head_fact(search.checkpoint, model, run.h, search.expected, search.limit)
    if head:
        return None, [head]
    cause = cause or search.pair()
    if cause is not None:
        return cause, [cause.sentence]
    known = facts(search.checkpoint, run.h, search.expected, run.differences, search.limit)
    return None, ["no cause was found among those that are tried", *known]


def _logits_check(run: _Run, limit: float, sentences: list[str]) -> Check:
    return measured("own_model_logits", "logits", run.worst, limit=limit, failures=sentences)


def _hidden_check(model: Model, run: _Run, expected: ExpectedOutputs, limit: float) -> Check:
    worst, sentences = float(hidden_differences(run.h, expected).amax()), []
    if not worst <= limit:
        sentences = [
            f"hidden differs by {worst:.3g} of its standard deviation, expected at most {limit:g} ({TOLERANCE}): it "
            "must be the output of the last layer at each position, before the final norm"
        ]
        with torch.no_grad():
            normed = float(hidden_differences(model.final_norm(run.h), expected).amax())
        if normed <= limit:
            sentences[0] += f"; yours is that after the final norm (difference {normed:.1g})"
    return measured("own_model_hidden", "hidden", worst, limit=limit, failures=sentences)


def _data(run: _Run, expected: ExpectedOutputs, first: int | None, cause: Cause | None) -> dict[str, Any]:
    blocks = run.differences.tensor_split(min(_BLOCKS, expected.positions))
    found = None
    if cause is not None:
        found = {
            "words": " and ".join(one.words for one in cause.variations),
            "advice": cause.sentence.partition(": ")[2],
            "before": cause.before,
            "after": cause.after,
        }
    return {
        "sha256": expected.sha256,
        "positions": expected.positions,
        "passes": run.passes,
        "deviation": expected.deviation,
        "first_position": first,
        "differences": [float(block.amax()) for block in blocks],
        "cause": found,
    }
