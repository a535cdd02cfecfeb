"""The result of a parity check: what every level found, one row per target, graph and regime, and on what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from crt_export.checkpoint import Checkpoint
from crt_export.environment import installed_versions
from crt_export.errors import BundleError, problem_list
from crt_export.ladder import CORPUS
from crt_export.machine import machine
from crt_export.parity.level import LevelResult, json_value

#: Identity of the document and the version of its schema, ``validate/report.schema.json``.
FORMAT = "crt-export parity report"
FORMAT_VERSION = 1

_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")

RUN = "run"
COMPILED = "compiled"


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One comparison. Figures are None where there is nothing to state; a row that failed says why.

    Attributes:
        target: Name of the engine profile, or ``pytorch-fp32`` and ``pytorch-half`` for the reference models.
        runtime: What ran: ``onnxruntime``, ``pytorch``, ``pytorch-half``, or the runtime an engine was compiled for.
        graph: The graph files that ran, joined with ``+``.
        precision: Precision of the graph.
        regime: ``step``, ``prefill``, ``prefill_pass``, ``handover``, or ``regime-gap`` (K passes against
            the recurrence).
        tokens: Predictions compared.
        steps: Decode steps run per window, or parallel passes for the prefill regimes; less if one failed.
        nll: Mean negative log-likelihood, nats per token.
        reference_nll: The same of PyTorch FP32 in the same regime; for ``regime-gap`` of the target's own step chain.
        delta_nll: ``nll - reference_nll``, paired.
        delta_nll_ci: 95 % interval of delta_nll, windows as units.
        perplexity: exp(nll).
        reference_perplexity: exp(reference_nll).
        max_abs_logit_error: Largest |logit difference|.
        mean_abs_logit_error: Mean |logit difference|.
        relative_logit_error: mean_abs_logit_error over the standard deviation of the reference's logits.
        relative_logit_error_ci: Its 95 % interval, windows as units; the gate is on the value.
        mean_kl: Mean Kullback-Leibler divergence, nats.
        top1_agreement: Share of the counted tokens with the reference's best token.
        top1_ci: Its 95 % interval, windows as units; the gate is on the share.
        top1_tokens: Tokens whose margin in the reference exceeds near_tie_margin.
        near_tie_margin: That margin, logits.
        arithmetic: What multiplied: ``fp32``, ``int8+fp32``, ``fp16``, ``fp32-emulated`` (an FP16 graph on a CPU),
            ``int8-emulated+fp16`` (the W8A8 plan in half-precision PyTorch).
        status: ``run``, or ``compiled`` for an engine that cannot run here.
        better_than_chance: Whether the reference predicts the text better than a uniform guess. Where it does not,
            delta_nll is reported and not gated: errors cancel to first order only in a model that fits the text.
        passed: None where nothing is gated.
        failures: Sentences, empty if none.
        positions: Positions in the window the row covers, [first, last + 1].
        excess_gap: ``regime-gap`` only: the gap beyond that of FP32, nats.
        excess_gap_ci: Its 95 % interval.
        largest_fp16: Largest |value| of any FP16 tensor of the graphs, FP16 graphs only.
        largest_fp16_tensor: Which tensor.
        inconsistency: Largest relative difference between two forms of the same computation inside the target.
    """

    target: str
    runtime: str
    graph: str
    precision: str
    regime: str
    tokens: int = 0
    steps: int = 0
    nll: float | None = None
    reference_nll: float | None = None
    delta_nll: float | None = None
    delta_nll_ci: tuple[float, float] | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    max_abs_logit_error: float | None = None
    mean_abs_logit_error: float | None = None
    relative_logit_error: float | None = None
    relative_logit_error_ci: tuple[float, float] | None = None
    mean_kl: float | None = None
    top1_agreement: float | None = None
    top1_ci: tuple[float, float] | None = None
    top1_tokens: int | None = None
    near_tie_margin: float | None = None
    arithmetic: str | None = None
    status: str = RUN
    better_than_chance: bool | None = None
    passed: bool | None = None
    failures: tuple[str, ...] = ()
    positions: tuple[int, int] | None = None
    excess_gap: float | None = None
    excess_gap_ci: tuple[float, float] | None = None
    largest_fp16: float | None = None
    largest_fp16_tensor: str | None = None
    inconsistency: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; NaN and infinity, which JSON lacks, become None (the failures name them)."""
        return json_value(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ParityRow:
        """Read what to_dict wrote."""
        fixed: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fixed)


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Everything that was compared and what it stands on.

    Attributes:
        rows: All comparisons of the corpus level, and engines that were compiled and not run.
        tolerances: The limits used, as ``Tolerances.to_dict`` gives them.
        text: Source, sha256 of the token ids, offset and count of the tokens used, windows and their length.
        levels: What every level found, target by target.
        notes: Sentences on what was shortened, left out or not gated, and why.
        method: How the intervals are computed.
        versions: Library versions that took part.
        environment: Machine and interpreter: ``machine``, ``processor``, ``cores``, ``system``, ``python``.
        model: ``checkpoint`` (content hash), ``config`` and ``parameters`` of the reference.
        created: When, ISO 8601 in UTC; empty inside a bundle, whose content depends on its inputs only.
        command: How to repeat it; empty where it did not come from the command line.
        largest_fp16: Per target and graph, the largest |value| of the largest FP16 tensors.
    """

    rows: tuple[ParityRow, ...]
    tolerances: Mapping[str, Any]
    text: Mapping[str, Any]
    levels: tuple[LevelResult, ...] = ()
    notes: tuple[str, ...] = ()
    method: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    command: str = ""
    largest_fp16: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True if something was gated and every gate held."""
        gates = [verdict.passed for verdict in (*self.rows, *self.levels) if verdict.passed is not None]
        return bool(gates) and all(gates)

    @property
    def failures(self) -> tuple[str, ...]:
        """What every failed row and check says, with its name in front."""
        rows = [f"{row.target} {row.regime} ({row.graph}): {failure}" for row in self.rows for failure in row.failures]
        # The rows are the corpus level's own; a check that repeats a row's sentence is not a second failure.
        said = {failure for row in self.rows for failure in row.failures}
        checks = [
            f"{result.target} {result.level} ({check.name}): {failure}"
            for result in self.levels
            for check in result.checks
            for failure in check.failures
            if not (result.level == CORPUS and failure in said)
        ]
        return (*rows, *checks)

    def to_dict(self) -> dict[str, Any]:
        """The document of ``crt-export validate --json``, of ``report.json`` and of the manifest."""
        values = {name.name: json_value(getattr(self, name.name)) for name in dataclasses.fields(self)}
        values["rows"] = [row.to_dict() for row in self.rows]
        values["levels"] = [result.to_dict() for result in self.levels]
        return {"format": FORMAT, "format_version": FORMAT_VERSION, "passed": self.passed, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ParityReport:
        """Read what to_dict wrote; a report of before there was a version has rows and no levels.

        Raises:
            BundleError: Another format or version, or keys are missing or unknown.
        """
        version = values.get("format_version", FORMAT_VERSION)
        if values.get("format", FORMAT) != FORMAT or version != FORMAT_VERSION:
            raise BundleError(
                f"parity report: expected {FORMAT!r} of version {FORMAT_VERSION}, found "
                f"{values.get('format', FORMAT)!r} of version {version!r}: use the crt-export that wrote it"
            )
        known = {name.name for name in dataclasses.fields(cls)}
        problems = [f"no {key!r}" for key in sorted({"rows", "tolerances", "text"} - set(values))]
        problems += [
            f"unknown key {key!r}" for key in sorted(set(values) - known - {"passed", "format", "format_version"})
        ]
        if problems:
            raise BundleError(problem_list("parity report", problems))
        try:
            rows = tuple(ParityRow.from_dict(row) for row in values["rows"])
            levels = tuple(LevelResult.from_dict(result) for result in values.get("levels", ()))
        except (TypeError, KeyError) as error:
            raise BundleError(f"parity report: a row cannot be read, or a level ({error})") from None
        rest = {key: value for key, value in values.items() if key in known - {"rows", "levels", "notes"}}
        return cls(rows=rows, levels=levels, notes=tuple(values.get("notes", ())), **rest)


def reference_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What every report says of the reference and of where it was made: ``versions``, ``environment`` and ``model``."""
    return {
        "versions": installed_versions(_LIBRARIES),
        "environment": machine(),
        "model": {
            "checkpoint": checkpoint.sha256,
            "parameters": checkpoint.config.parameter_count,
            "config": checkpoint.config.to_dict(),
        },
    }
