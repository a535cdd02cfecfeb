"""Level ``own-model``: does this package's PyTorch model compute what the user's own one does?

Every other level compares what is deployed with :mod:`crt_export.model`, so a wrong word in ``config.json`` passes all
of them: both sides read it. This level compares :mod:`crt_export.model` in FP32 with logits that the user's own model
gave (``--expect``). The figure is the largest |difference| of any logit at any position, over the standard deviation of
a position's expected logits (mean over the positions): the largest, because one token that sees a wrong key is a fault
and a mean over many that do not would hide it.

A CRT has two regimes, the exact recurrence and K parallel passes. The file's metadata ``passes`` says which one it is
of; where it does not, the recurrence is tried and then the checkpoint's ``unroll_steps``, and the result names which
one agreed.

Agreement is to rounding or it has a cause: the first variation of this package's model that makes the difference go
away. Where a difference within the limit is more than rounding, and another word in ``config.json`` makes it ten times
smaller, that word is wrong and the check ``config.json`` fails; another cause is noted.

``data``: ``sha256`` of the file, ``positions``, ``passes`` compared with, ``deviation`` of the logits,
``first_position`` that differs (None: none does), ``differences`` by position (largest of each block where there are
more than 256), and ``cause`` (``words``, ``advice``, ``before``, ``after``; None where none was found or needed).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from crt_export.checkpoint import Checkpoint
from crt_export.errors import ParityError, problem_list
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity.expected_outputs import EXACT, ExpectedOutputs, Passes, read_expected_outputs, run_model
from crt_export.parity.levels import NOT_COMPARED, OWN_MODEL, WHEN_BUILT
from crt_export.parity.metrics import Check, measured
from crt_export.parity.own_model_variations import Cause, Variation, regime_text, variations, varied_model
from crt_export.parity.report import LevelResult, ParityReport, reference_facts
from crt_export.parity.tolerances import Tolerances, load_tolerances
from crt_export.progress import Progress, no_progress

TARGET = "pytorch-fp32"
TOLERANCE = "shared.own_model_error"
#: Sums in another order stay below this (measured 2e-6); what passes the gate above it is looked into all the same.
_AGREES = 3e-5
#: Variations whose differences are both rounding, or within the factor, explain equally well: the first one is named.
_ROUNDING, _AS_GOOD = 1e-5, 2.0
#: Positions from the first one that differs, which variations are tried on; what explains these is run on all of them.
_POSITIONS, _LATEST_START = 6, 64
#: Largest difference that arithmetic of fewer bits gives: bfloat16 3e-2 on the demo.
_SMALL = 0.1
_FEW_POSITIONS = 64
_BLOCKS = 256
_LINEAR_COLUMNS, _SPARE_ROWS = 512, 16


def not_compared(recorded: str = "") -> LevelResult:
    """The level where there is nothing to compare with.

    Args:
        recorded: What an earlier report of the same checkpoint says; empty where it says nothing.
    """
    note = (
        f"{NOT_COMPARED}: agreement is with this package's PyTorch model of config.json; --expect FILE.safetensors "
        "compares that with yours"
    )
    notes = (note, f"{WHEN_BUILT}: {recorded}") if recorded else (note,)
    return LevelResult(level=OWN_MODEL, target=TARGET, checks=(Check(name="logits"),), notes=notes)


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
    run = _agreeing_run(checkpoint, expected, limit, progress)
    cause, sentences, notes, checks = None, [], [*run.notes()], []
    if run.first is not None:
        cause, sentences = run.explanation()
    elif run.worst > _AGREES:
        cause = run.cause()
        if cause is not None and cause.after > run.worst / 10:
            cause = None
        if cause is not None:
            notes.append(f"your own model agrees within the limit, and not as closely as rounding: {cause.sentence}")
            if cause.in_config:
                checks.append(Check(name="config.json", passed=False, failures=(cause.sentence,)))
    checks.insert(0, measured("own_model_logits", "logits", run.worst, limit=limit, failures=sentences))
    if expected.hidden is not None:
        checks.append(run.hidden_check())
    data = {
        "sha256": expected.sha256,
        "positions": expected.positions,
        "passes": run.passes,
        "deviation": expected.deviation,
        "first_position": run.first,
        "differences": [
            float(block.amax()) for block in run.differences.tensor_split(min(_BLOCKS, expected.positions))
        ],
        "cause": None if cause is None else cause.data,
    }
    return LevelResult(level=OWN_MODEL, target=TARGET, checks=tuple(checks), data=data, notes=tuple(notes))


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
    text = {"sha256": result.data["sha256"], "offset": 0, "tokens": count, "windows": 1, "window": count}
    return ParityReport(
        levels=(result,),
        tolerances=(tolerances or load_tolerances()).to_dict(),
        text={"source": str(path), **text},
        notes=result.notes,
        **reference_facts(checkpoint),
    )


def _agreeing_run(checkpoint: Checkpoint, expected: ExpectedOutputs, limit: float, progress: Progress) -> _Run:
    """The regime that the file names; where it names none, the first that agrees, or the recurrence."""
    model = model_from_checkpoint(checkpoint)
    regimes: tuple[Passes, ...] = (EXACT, model.carried.passes) if model.carried.iterated else (EXACT,)
    runs = []
    for passes in regimes if expected.passes is None else (expected.passes,):
        h = run_model(model, expected.input_ids, passes)
        runs.append(_Run(checkpoint, model, expected, limit, progress, passes, h))
        if runs[-1].worst <= limit:
            return runs[-1]
    return runs[0]


@dataclass(frozen=True, eq=False)
class _Run:
    """This package's model in one regime beside what the user's gave, and the search for what explains a difference."""

    checkpoint: Checkpoint
    model: LanguageModel  # this package's, in FP32
    expected: ExpectedOutputs
    limit: float  # of a difference, and what a cause must make it fall to
    progress: Progress  # told how many variations were tried
    passes: Passes
    h: Tensor  # hidden states of this package's model, [n, hidden]

    @cached_property
    def differences(self) -> Tensor:
        """Of the logits, by position."""
        return self.expected.logit_differences(self.model, self.h)

    @property
    def worst(self) -> float:
        """Largest of them."""
        return float(self.differences.amax())

    @cached_property
    def first(self) -> int | None:
        """First position that differs by more than the limit, or is no number."""
        return next(iter((~(self.differences <= self.limit)).nonzero().flatten().tolist()), None)

    def notes(self) -> Iterator[str]:
        """What the comparison does not show."""
        config, positions = self.checkpoint.config, self.expected.positions
        if positions < _FEW_POSITIONS:
            yield (
                f"your own model was compared on {positions} tokens only: {_FEW_POSITIONS} and more show a wrong "
                "rope_theta or sliding_window better"
            )
        if config.carried.iterated and self.passes not in (EXACT, config.carried.passes):
            yield (
                f"your own model's logits are those of {regime_text(self.passes)}; the deployment runs the recurrence, "
                f"and {config.carried.passes} passes where it prefills (unroll_steps): their gap is in the report"
            )

    def hidden_check(self) -> Check:
        """Whether the hidden states agree."""
        worst, sentences = self.expected.hidden_difference(self.h), []
        if not worst <= self.limit:
            sentences = [
                f"hidden differs by {worst:.3g} of its standard deviation, expected at most {self.limit:g} "
                f"({TOLERANCE}): it must be the output of the last layer at each position, before the final norm"
            ]
            with torch.no_grad():
                normed = self.expected.hidden_difference(self.model.final_norm(self.h))
            if normed <= self.limit:
                sentences[0] += f"; yours is that after the final norm (difference {normed:.1g})"
        return measured("own_model_hidden", "hidden", worst, limit=self.limit, failures=sentences)

    # --- causes
    def explanation(self) -> tuple[Cause | None, list[str]]:
        """What explains the difference, and the sentences on it: where it is, then why or what narrows it down."""
        failure = (
            f"your model's logits and those of this package's model ({regime_text(self.passes)}) differ by "
            f"{self.worst:.3g} of their standard deviation, expected at most {self.limit:g} ({TOLERANCE}), first at "
            f"position {self.first} of {self.expected.positions}"
        )
        cause = self.cause()
        head = "" if cause else self._head_fact()
        if head:
            return None, [failure, head]
        if cause is None:
            paired = [one for one in self._variations() if one.pair]
            cause = self._best([(a, b) for a, b in itertools.combinations(paired, 2) if a.pair != b.pair])
        if cause is not None:
            return cause, [failure, cause.sentence]
        return None, [failure, "no cause was found among those that are tried", *self._facts()]

    def cause(self) -> Cause | None:
        """The one variation that explains the difference; None where none does."""
        return self._shifted() or self._best([(one,) for one in self._variations()])

    def _variations(self) -> list[Variation]:
        return variations(self.checkpoint.config, self.passes, self.expected.passes is not None, self.first or 0)

    def _best(self, candidates: Sequence[tuple[Variation, ...]]) -> Cause | None:
        """The candidate of the smallest difference, if it explains all positions."""
        first, tried = self.first or 0, []
        for index, candidate in enumerate(candidates):
            self.progress("your own model differs: looking for the cause", index, len(candidates))
            # Only a window does nothing before the first position that differs by more than the limit.
            late = any("sliding_window" in one.config for one in candidate)
            start = first if late else min(first, _LATEST_START)
            tried.append((self._difference(candidate, start + _POSITIONS), candidate))
        least = min((after for after, _ in tried), default=math.inf)
        for after, candidate in tried:
            if after <= min(self.limit, max(_ROUNDING, _AS_GOOD * least)):
                whole = self._difference(candidate, self.expected.positions)
                if whole <= self.limit:
                    return Cause(variations=candidate, before=self.worst, after=whole)
        return None

    def _difference(self, candidate: Sequence[Variation], positions: int) -> float:
        """Largest difference of the logits over the first positions; infinity where it is no number."""
        passes = next((one.passes for one in candidate if one.passes is not None), self.passes)
        before = [token for one in candidate for token in one.before]
        room = self.checkpoint.config.max_position_embeddings - len(before)
        ids = self.expected.input_ids[: min(positions, room)]
        model = varied_model(self.checkpoint, candidate)
        h = run_model(model, torch.cat([ids.new_tensor(before), ids]), passes)[len(before) :]
        found = float(self.expected.logit_differences(model, h).amax())
        return math.inf if math.isnan(found) else found

    def _shifted(self) -> Cause | None:
        """Logits that stand one row too early or too late, as where they were cut to fit the next tokens."""
        for way, ours, theirs in (("up", slice(-1), slice(1, None)), ("down", slice(1, None), slice(-1))):
            part = dataclasses.replace(self.expected, logits=self.expected.logits[theirs])
            after = float(part.logit_differences(self.model, self.h[ours]).amax())
            if after <= self.limit:
                advice = "row t of logits must be what your model gives after token t of input_ids"
                shift = Variation(words=f"your logits moved {way} by one row", advice=advice)
                return Cause(variations=(shift,), before=self.worst, after=after)
        return None

    def _head_fact(self) -> str:
        """That all before the head agrees, so that the head differs; empty where it does not or cannot be told."""
        if self.expected.hidden is not None:
            worst = self.expected.hidden_difference(self.h)
            if not worst <= self.limit:
                return ""
            found = f"the hidden states agree (largest difference {worst:.1g})"
        elif self._logits_are_linear():
            found = "your logits are a linear function of this package's normed hidden states"
        else:
            return ""
        return f"{found}, so your model's head is another one: {self._mended_head()}"

    def _facts(self) -> Iterator[str]:
        """What is known of a difference without a cause: where it begins, how it grows, and what was not tried."""
        if self.first == 0:
            yield (
                "position 0 differs already, where attention sees one token and h is 0: embedding, correction, norms, "
                "activation, v and o or head, not the rotary embedding"
            )
        else:
            agree = "position 0 agrees" if self.first == 1 else f"positions 0 to {(self.first or 0) - 1} agree"
            yield f"{agree}: what differs is attention's positions or window, or the state, and not the head"
        half = len(self.differences) // 2
        early, late = float(self.differences[:half].mean()), float(self.differences[half:].mean())
        yield f"mean of the largest differences {early:.2g} in the first half and {late:.2g} in the second"
        if self.worst < _SMALL:
            yield "so small a difference may be TF32, bfloat16 or float16 in your model: run it in float32 on a CPU"
        if self.expected.hidden is not None:
            worst = self.expected.hidden_difference(self.h)
            yield f"the hidden states differ too, by {worst:.2g} of their deviation, so it is not the head alone"
        else:
            yield "save 'hidden' too and this tells whether the head differs"
            if self.checkpoint.config.tie_word_embeddings:
                yield f"a head of its own could not be tried: {self._mended_head()}"

    def _mended_head(self) -> str:
        if self.checkpoint.config.tie_word_embeddings:
            return (
                "tie_word_embeddings = true says that it is the embedding: set it to false in config.json and write "
                "your model's lm_head.weight and lm_head.bias to model.safetensors"
            )
        return "write its lm_head.weight and lm_head.bias, and its final_norm, to model.safetensors"

    def _logits_are_linear(self) -> bool:
        """Whether one matrix and bias give the logits of all positions; False where there are too few to tell."""
        features = self.model.final_norm(self.h)
        if len(features) < features.shape[1] + 1 + _SPARE_ROWS:
            return False
        inputs = torch.cat([features, features.new_ones(len(features), 1)], dim=1).double()
        wanted = self.expected.logits[:, :_LINEAR_COLUMNS].double()
        solution = torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
        return float((inputs @ solution - wanted).abs().amax()) <= self.limit * self.expected.deviation
