"""L4: greedy continuations of many prompts, each fed its own tokens, by the target and by PyTorch FP32.

Once two continuations differ in a token their histories differ, so only the first divergent token of a prompt says
something about the target: there the reference had the same history, and its margin (its logit of its own token minus
that of the target's) says how close the decision was. The gate holds the largest such margin, in units of the
standard deviation of the reference's logits there, or of its median over all continuations where that is larger.

The figures have the names and meaning of OpenVINO's who_what_benchmark (after Deiseroth et al., "Divergent Token
Metrics", arXiv 2311.01544): FDT is the number of tokens before the first divergent one, SDT the number of divergent
tokens after matching what the two have in common; ``norm`` divides by the tokens of a continuation. ``data``:

* ``prompts``, ``prompt_tokens``, ``new_tokens``, ``identical`` (prompts with the same continuation)
* ``agreement`` (FDT per prompt), ``agreement_mean``, ``agreement_median``, ``first_divergence_normalised`` (FDT norm)
* ``divergent_tokens`` (mean SDT), ``divergent_share`` (SDT norm)
* ``divergences``: per prompt that diverged ``prompt``, ``token``, ``expected`` and ``found`` (ids), ``margin``,
  ``relative_margin``, ``near_tie`` (whether the margin is below the shared near-tie margin)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch

from crt_export.errors import ContractError
from crt_export.parity.levels import FREE_RUNNING
from crt_export.parity.metrics import Check, claim, measured
from crt_export.parity.reference import Continuation
from crt_export.parity.report import LevelResult
from crt_export.parity.runner import Runner
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.text import begin_rows

#: Longest prompt.
_PROMPT_TOKENS = 32
#: A model above the first number continues at most as many prompts, by as many tokens, as the others say.
_LARGE_PARAMETERS, _LARGE_PROMPTS, _LARGE_NEW_TOKENS = 20_000_000, 8, 32
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prompts:
    """Token ids, int64 [prompts, tokens], how far to continue them, and notes on what was shortened."""

    ids: np.ndarray
    new_tokens: int
    notes: tuple[str, ...]


@dataclass(kw_only=True)
class _Run:
    """What the target gave: tokens, int64 [prompts, new tokens], and sentences on what was wrong by itself."""

    tokens: np.ndarray
    not_finite: list[str] = field(default_factory=list)
    not_argmax: list[str] = field(default_factory=list)


def check_free_running(case: ParityCase, setup: ParitySetup) -> LevelResult:
    """Continue prompts from the text by greedy decoding, as the deployed engine and decoder do.

    Args:
        case: The target.
        setup: Reference, text, ``prompts`` and ``new_tokens``.

    Raises:
        ContractError: A graph differs from its contract, cannot be loaded, or fails.
    """
    prompts = _prompts(case, setup)
    expected = setup.reference.continuation(prompts.ids, _reference_tokens(prompts, setup))
    runner = setup.runner(case)
    run = _Run(tokens=np.zeros((len(prompts.ids), prompts.new_tokens), np.int64))
    rows = runner.most_rows(prompts.ids.shape[1] + prompts.new_tokens)
    for first in range(0, len(prompts.ids), rows):
        _continue(runner, prompts.ids[first : first + rows], first, run)
    data = _figures(prompts, expected, run.tokens, setup)
    checks = (
        _margin_check(case, setup, data),
        claim("logits", run.not_finite),
        claim("next_token", run.not_argmax),
        measured("agreement", "agreement", data["first_divergence_normalised"]),
    )
    return LevelResult(level=FREE_RUNNING, target=case.target, checks=checks, data=data, notes=prompts.notes)


def _prompts(case: ParityCase, setup: ParitySetup) -> _Prompts:
    """Prompts at even distances of the text, as many and as long as text, model and capacity have room for."""
    options, (count, wanted), notes = setup.options, _wanted(setup), []
    if (count, wanted) != (options.prompts, options.new_tokens):
        notes.append(
            f"free-running: {count} prompts continued by {wanted} tokens instead of {options.prompts} by "
            f"{options.new_tokens}: the model has more than {_LARGE_PARAMETERS:,} parameters"
        )
    length = max(1, min(_PROMPT_TOKENS, setup.windows.length // 2))
    room = case.room(setup.config) - length + 1
    if room < wanted:
        notes.append(
            f"free-running: {room} new tokens instead of {wanted}: {case.target} holds {room + length - 1} tokens"
        )
    starts = np.unique(np.linspace(0, len(setup.text) - length, count).round().astype(int))
    if len(starts) < count:
        notes.append(f"free-running: {len(starts)} prompts instead of {count}: the text has no more")
    ids = np.ascontiguousarray(begin_rows(setup.text.ids[starts[:, None] + np.arange(length)], setup.text.bos_token_id))
    return _Prompts(ids=ids, new_tokens=min(room, wanted), notes=tuple(notes))


def _wanted(setup: ParitySetup) -> tuple[int, int]:
    """Prompts and new tokens, fewer where the model is large."""
    prompts, new_tokens = setup.options.prompts, setup.options.new_tokens
    if setup.config.parameter_count > _LARGE_PARAMETERS:
        return min(prompts, _LARGE_PROMPTS), min(new_tokens, _LARGE_NEW_TOKENS)
    return prompts, new_tokens


def _reference_tokens(prompts: _Prompts, setup: ParitySetup) -> int:
    """As many as the target with the most room asks for, so that all share one continuation."""
    room = setup.config.max_position_embeddings - prompts.ids.shape[1] + 1
    return min(room, _wanted(setup)[1])


def _continue(runner: Runner, prompts: np.ndarray, first: int, run: _Run) -> None:
    """Step some prompts and then feed every ``next_token`` back; fills in ``run``."""
    length, total = prompts.shape[1], prompts.shape[1] + run.tokens.shape[1] - 1
    decoding = runner.decoding(len(prompts), total)
    for position in range(total):
        new = position - length
        fed = prompts[:, position] if new < 0 else run.tokens[first : first + len(prompts), new]
        # An id that no model knows was noted when it came out; what is fed in its place no longer matters.
        fed = np.where((fed >= 0) & (fed < runner.config.vocab_size), fed, 0)
        try:
            decoding.step(fed)
        except ContractError as error:
            raise ContractError(f"step {position} of {total}: {error}") from error
        tokens = decoding.next_tokens()
        _note_problems(decoding.logits(), tokens, position, first, run)
        if new + 1 >= 0:
            run.tokens[first : first + len(prompts), new + 1] = tokens


def _note_problems(logits: np.ndarray, tokens: np.ndarray, position: int, first: int, run: _Run) -> None:
    """The first logits that are not finite, and the first token that is not their argmax."""
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all() and not run.not_finite:
        run.not_finite.append(f"NaN or infinite, first in prompt {first + int(finite.argmin())} at position {position}")
    inside = (tokens >= 0) & (tokens < logits.shape[1])
    own = logits[np.arange(len(tokens)), np.where(inside, tokens, 0)]
    wrong = finite & ~(inside & (own == logits.max(axis=1)))
    if wrong.any() and not run.not_argmax:
        row = int(wrong.argmax())
        run.not_argmax.append(
            f"{tokens[row]} after position {position} of prompt {first + row}, expected the argmax of its logits, "
            f"{int(logits[row].argmax())}"
        )


def _figures(prompts: _Prompts, expected: Continuation, found: np.ndarray, setup: ParitySetup) -> dict[str, Any]:
    reference = expected.tokens[:, : prompts.new_tokens]
    differs = reference != found
    agreement = np.where(differs.any(axis=1), differs.argmax(axis=1), prompts.new_tokens)
    divergent = [_divergent_tokens(a, b) for a, b in zip(reference.tolist(), found.tolist(), strict=True)]
    return {
        "prompts": len(found),
        "prompt_tokens": prompts.ids.shape[1],
        "new_tokens": prompts.new_tokens,
        "identical": int((~differs.any(axis=1)).sum()),
        "agreement": agreement.tolist(),
        "agreement_mean": float(agreement.mean()),
        "agreement_median": float(np.median(agreement)),
        "first_divergence_normalised": float(agreement.mean() / prompts.new_tokens),
        "divergent_tokens": float(np.mean(divergent)),
        "divergent_share": float(np.mean(divergent) / prompts.new_tokens),
        "divergences": [
            _divergence(prompt, int(agreement[prompt]), expected, int(found[prompt, agreement[prompt]]), setup)
            for prompt in np.flatnonzero(differs.any(axis=1)).tolist()
        ],
    }


def _divergent_tokens(expected: list[int], found: list[int]) -> int:
    blocks = SequenceMatcher(None, expected, found, autojunk=False).get_matching_blocks()
    return len(found) - sum(block.size for block in blocks)


@torch.no_grad()
def _divergence(prompt: int, token: int, expected: Continuation, found: int, setup: ParitySetup) -> dict[str, Any]:
    """The reference's view of the first token in which a target differs from it."""
    logits = setup.model.head(expected.hidden[prompt, token]).double().numpy()
    own = int(expected.tokens[prompt, token])
    margin = float(logits[own] - logits[found]) if 0 <= found < len(logits) else np.inf
    # Of three logits, say, all may be equal by chance at one token, and then any margin is many deviations.
    spread = max(float(expected.spread[prompt, token]), float(np.median(expected.spread)), _TINY)
    return {
        "prompt": prompt,
        "token": token,
        "expected": own,
        "found": found,
        "margin": margin,
        "relative_margin": margin / spread,
        "near_tie": margin <= setup.tolerances.near_tie_margin,
    }


def _margin_check(case: ParityCase, setup: ParitySetup, data: dict[str, Any]) -> Check:
    limit = setup.limits(case.precision).divergence_margin
    divergences = data["divergences"]
    worst = max((entry["relative_margin"] for entry in divergences), default=0.0)
    beyond = [entry for entry in divergences if not entry["relative_margin"] <= limit]
    failures = []
    if beyond:
        first = min(beyond, key=lambda entry: (entry["token"], entry["prompt"]))
        failures.append(
            f"{len(beyond)} of {data['prompts']} prompts diverge where the reference was sure, first prompt "
            f"{first['prompt']} at token {first['token']}: found {first['found']}, expected {first['expected']}, whose "
            f"logit is {first['margin']:.3g} larger, {first['relative_margin']:.3g} standard deviations, expected at "
            f"most {limit:g} ({case.precision}.divergence_margin)"
        )
    return measured(
        "divergence_margin", "first divergence", worst, limit=limit, precision=case.precision, failures=failures
    )
