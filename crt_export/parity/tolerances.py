"""Tolerances of what is deployed against PyTorch FP32: ``validate/tolerances.toml``, where every limit has a reason."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from crt_export.catalog import definition_path
from crt_export.errors import InputError, problem_list
from crt_export.parity.metrics import SHARED_LIMITS

FILE = "tolerances.toml"
PRECISIONS = ("fp32", "fp16", "w8", "w8a8")
#: Limits that a precision may leave out: nothing is gated then.
_OPTIONAL = ("max_abs_logit_error",)
_SHARES = ("top1_agreement", "top10_overlap", "learnt_share")


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limits of one precision.

    Attributes:
        delta_nll: The 95 % interval of the paired difference in negative log-likelihood lies within +- this, nats.
        top1_agreement: Smallest share of tokens with the reference's most likely token, where its margin counts.
        gap_delta_nll: The same as ``delta_nll`` for how much further apart the two regimes are than in FP32, nats.
        consistency: Largest |difference| between two forms of one computation inside a target (prefill against
            calls of prefill_pass, its logits against head), relative to the largest |value|.
        relative_logit_error: Largest mean |logit difference| in units of the standard deviation of the reference's
            logits. Independent of what the text says, so it also judges models that predict it worse than chance.
        tensor_error: One step from the reference's own state: largest |difference| of any output tensor over the
            largest |value| of that tensor in the reference.
        chain_error: The same at every step of a teacher-forced chain that feeds itself its own state and caches.
        mean_kl: Largest mean Kullback-Leibler divergence, nats.
        top10_overlap: Smallest mean share of the reference's ten likeliest tokens among the target's.
        probability_change: Largest root mean square change of the probability of the text's next token.
        divergence_margin: Free running: largest margin that the reference had for its own token where the target chose
            another one first, in units of the standard deviation of the reference's logits.
        anchor_error: K passes over K tokens are the recurrence: largest |difference| of the hidden states over the
            largest |value|.
        handover_delta_nll: Decoding from K passes against decoding from the recurrence, as far as FP32 does not do it
            too: the 95 % interval of the paired difference lies within +- this, nats.
        growth: Largest growth of the relative logit error over the long run (upper end of its 95 % interval), in units
            of the run's mean error.
        state_norm: Largest |log ratio| of the norm of the state to that of the reference, block by block.
        selftest_error: Largest |difference| of a replayed tensor over the largest |value| of the vector.
        max_abs_logit_error: Largest |logit difference|; None is not gated.
    """

    delta_nll: float
    top1_agreement: float
    gap_delta_nll: float
    consistency: float
    relative_logit_error: float
    tensor_error: float
    chain_error: float
    mean_kl: float
    top10_overlap: float
    probability_change: float
    divergence_margin: float
    anchor_error: float
    handover_delta_nll: float
    growth: float
    state_norm: float
    selftest_error: float
    max_abs_logit_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """All limits.

    Attributes:
        near_tie_margin: Tokens whose two most likely candidates are closer than this in the reference are near ties
            and do not count for top-1 agreement, logits.
        fp16_headroom: Largest |value| that any FP16 tensor may take.
        perplexity_gap: The certificate's smallest K is the smallest whose |perplexity gap| to the recurrence is at most
            this with 95 % confidence.
        weight_rounding: Largest distance of an INT8 weight from the checkpoint's, quantisation steps.
        learnt_share: A model whose recorded likelihood is at most this share of a uniform guess's surprise has learnt
            its text, and only then the validation text is gated.
        own_model_error: Largest |difference| of PyTorch FP32 from the logits of the user's own model, in standard
            deviations of those logits.
        precisions: Limits per precision.
        reasons: Why each limit is what it is, by ``table.key``.
    """

    near_tie_margin: float
    fp16_headroom: float
    perplexity_gap: float
    weight_rounding: float
    learnt_share: float
    own_model_error: float
    precisions: Mapping[str, Tolerance]
    reasons: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values as they stand in the report."""
        limits = {name: vars(tolerance).copy() for name, tolerance in self.precisions.items()}
        return {**{name: getattr(self, name) for name in SHARED_LIMITS}, **limits}


def load_tolerances(path: Path | None = None) -> Tolerances:
    """Read a tolerance file; None is the tracked one.

    Raises:
        InputError: The file is unreadable, a limit or its reason is missing, unknown or impossible; lists all problems.
        MissingDependencyError: The installation lacks the tracked file.
    """
    source = definition_path("validate", FILE) if path is None else path
    try:
        values = tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{source}: expected a TOML file of tolerances, found none ({error})") from None
    known = {"shared": SHARED_LIMITS, **dict.fromkeys(PRECISIONS, tuple(field.name for field in fields(Tolerance)))}
    problems = [f"unknown table [{table}]; known: {', '.join(known)}" for table in values if table not in known]
    limits: dict[str, dict[str, float]] = {table: {} for table in known}
    reasons: dict[str, str] = {}
    for table, names in known.items():
        entries = values.get(table, {})
        problems += [f"[{table}] unknown key {key!r}" for key in entries if key not in names]
        problems += [f"[{table}] has no {key}" for key in names if key not in entries and key not in _OPTIONAL]
        for key in (name for name in names if name in entries):
            problems += (found := _entry_problems(f"{table}.{key}", entries[key]))
            if not found:
                limits[table][key], reasons[f"{table}.{key}"] = entries[key]["limit"], entries[key]["reason"]
    if problems:
        raise InputError(problem_list(str(source), problems))
    precisions = {name: Tolerance(**limits[name]) for name in PRECISIONS}
    return Tolerances(**limits["shared"], precisions=precisions, reasons=reasons)


def _entry_problems(label: str, entry: object) -> list[str]:
    if not isinstance(entry, dict) or set(entry) != {"limit", "reason"}:
        return [f"{label} must be {{ limit = NUMBER, reason = TEXT }}, found {entry!r}"]
    problems = []
    limit, reason = entry["limit"], entry["reason"]
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < float("inf"):
        problems.append(f"{label}: limit must be a number greater than 0, found {limit!r}")
    elif label.endswith(_SHARES) and limit > 1:
        problems.append(f"{label}: limit is a share and at most 1, found {limit!r}")
    if not isinstance(reason, str) or len(reason.split()) < 3:
        problems.append(f"{label}: reason must say why, found {reason!r}")
    return problems
