"""The report of parity: what every level found of every target, on what, and against which limits.

A result is stored once, as a :class:`~crt_export.parity.metrics.Check` of a level. A :class:`Comparison`, one regime of
one target on the text, is what its checks and the facts in the level's data say together. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crt_export.environment import installed_versions
from crt_export.errors import InputError, problem_list
from crt_export.machine import machine
from crt_export.parity.levels import CORPUS
from crt_export.parity.metrics import Check, json_value

if TYPE_CHECKING:
    from crt_export.checkpoint import Checkpoint

#: Identity of the document and the version of its schema, ``validate/report.schema.json``.
FORMAT = "crt-export parity report"
FORMAT_VERSION = 1

_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")

RUN = "run"
COMPILED = "compiled"
GAP = "regime-gap"
_LARGEST_EXPONENT = 700  # float64 ends near exp(709)


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite beyond what float64 holds, and for NaN."""
    return math.exp(nll) if nll < _LARGEST_EXPONENT else math.inf


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One regime of one target against PyTorch FP32 in the same regime.

    Attributes:
        target: Name of the engine profile, or ``pytorch-fp32`` and ``pytorch-half`` for the reference models.
        runtime: What ran: ``onnxruntime``, ``pytorch``, ``pytorch-half``, or the runtime an engine was compiled for.
        graph: The graph files that ran, joined with ``+``.
        precision: Precision of the graph.
        regime: ``step``, ``prefill``, ``prefill_pass``, ``handover``, or ``regime-gap`` (K passes against
            the recurrence).
        label: What the names of its checks begin with, unique within the target: ``regime-gap 0-128``.
        arithmetic: What multiplied: ``fp32``, ``int8+fp32``, ``fp16``, ``fp32-emulated`` (an FP16 graph on a CPU),
            ``int8-emulated+fp16`` (the W8A8 plan in half-precision PyTorch).
        status: ``run``, or ``compiled`` for an engine that cannot run here.
        tokens: Predictions compared.
        steps: Decode steps run per window, or parallel passes for the prefill regimes; less if one failed.
        positions: Positions in the window that are compared, [first, last + 1].
        nll: Mean negative log-likelihood, nats per token; None where the regime did not run to its end.
        reference_nll: The same of PyTorch FP32 in the same regime; for ``regime-gap`` of the target's own step chain.
        mean_abs_logit_error: Mean |logit difference|.
        top1_tokens: Tokens whose margin in the reference exceeds the near-tie margin: those that top-1 counts.
        better_than_chance: Whether the reference predicts the text better than a uniform guess. Where it does not,
            delta_nll is reported and not gated: errors cancel to first order only in a model that fits the text.
        checks: Every gate and every figure that is only reported.
        statistics: Distributions, see :mod:`crt_export.parity.comparison`; empty where the regime did not run to
            its end, or is a regime gap.
    """

    target: str
    runtime: str
    graph: str
    precision: str
    regime: str
    label: str = ""
    arithmetic: str | None = None
    status: str = RUN
    tokens: int = 0
    steps: int = 0
    positions: tuple[int, int] | None = None
    nll: float | None = None
    reference_nll: float | None = None
    mean_abs_logit_error: float | None = None
    top1_tokens: int | None = None
    better_than_chance: bool | None = None
    checks: tuple[Check, ...] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """None where nothing was gated, else whether every gate held."""
        return held(self.checks)

    @property
    def failures(self) -> tuple[str, ...]:
        """What its failed checks say."""
        return tuple(failure for check in self.checks for failure in check.failures)

    @property
    def perplexity(self) -> float | None:
        """exp(nll)."""
        return None if self.nll is None else perplexity(self.nll)

    @property
    def reference_perplexity(self) -> float | None:
        """exp(reference_nll)."""
        return None if self.reference_nll is None else perplexity(self.reference_nll)

    def check(self, metric: str) -> Check | None:
        """The check of a figure; None where the regime has none."""
        return next((check for check in self.checks if check.metric == metric), None)

    def value(self, metric: str) -> float | None:
        """A figure; None where the regime has none."""
        check = self.check(metric)
        return None if check is None else check.value

    def interval(self, metric: str) -> tuple[float, float] | None:
        """The 95 % interval of a figure; None where it has none."""
        check = self.check(metric)
        return None if check is None else check.interval

    def judged(self, *checks: Check) -> Comparison:
        """With more checks."""
        return dataclasses.replace(self, checks=(*self.checks, *checks))

    @property
    def data(self) -> dict[str, Any]:
        """What a level's data holds of it: everything that its checks do not."""
        facts = {key: value for key, value in vars(self).items() if key in _FACTS}
        return {**facts, **self.statistics}


_FACTS = tuple(
    entry.name
    for entry in dataclasses.fields(Comparison)
    if entry.name not in ("target", "label", "checks", "statistics")
)


@dataclass(frozen=True, kw_only=True)
class LevelResult:
    """What one level found about one target.

    Attributes:
        level: ``own-model`` to ``long-run``, see :mod:`crt_export.parity.levels`.
        target: Name of the engine profile, or ``pytorch-fp32`` and ``pytorch-half`` for the reference models.
        checks: What was judged or reported; at least one.
        data: Curves and tables of the level, JSON-ready; its keys are documented in the level's module.
        notes: Sentences on what was shortened or left out, and why.
    """

    level: str
    target: str
    checks: tuple[Check, ...]
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool | None:
        """None where nothing was gated, else whether every gate held."""
        return held(self.checks)

    @property
    def failures(self) -> tuple[str, ...]:
        """What every failed check says, with its name in front."""
        return tuple(f"{check.name}: {failure}" for check in self.checks for failure in check.failures)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The regimes of a corpus level, engines that were compiled and not run included."""
        found = []
        for label, data in (self.data.get("regimes") or {}).items():
            facts = {key: data[key] for key in _FACTS if key in data}
            facts["positions"] = tuple(facts["positions"]) if facts.get("positions") else None
            statistics = {key: value for key, value in data.items() if key not in _FACTS}
            checks = tuple(check for check in self.checks if check.name.startswith(f"{label}: "))
            found.append(Comparison(target=self.target, label=label, checks=checks, statistics=statistics, **facts))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"level": self.level, "target": self.target, "passed": self.passed, **json_value(vars(self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LevelResult:
        """Read what to_dict wrote."""
        checks = tuple(Check.from_dict(check) for check in values["checks"])
        return cls(
            checks=checks, notes=tuple(values["notes"]), **{key: values[key] for key in ("level", "target", "data")}
        )


def corpus_result(
    target: str, comparisons: Sequence[Comparison], *checks: Check, notes: Sequence[str] = (), **data: Any
) -> LevelResult:
    """The corpus level's answer about one target.

    Args:
        target: The target.
        comparisons: Its regimes.
        checks: What else was judged.
        notes: Sentences on what was left out.
        data: What else was measured.
    """
    return LevelResult(
        level=CORPUS,
        target=target,
        checks=(*checks, *(check for comparison in comparisons for check in comparison.checks)),
        data={"regimes": {comparison.label: comparison.data for comparison in comparisons}, **data},
        notes=tuple(notes),
    )


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Everything that was compared and what it stands on.

    Attributes:
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
    """

    tolerances: Mapping[str, Any]
    text: Mapping[str, Any]
    levels: tuple[LevelResult, ...]
    notes: tuple[str, ...] = ()
    method: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    command: str = ""

    @property
    def passed(self) -> bool:
        """True if something was gated and every gate held."""
        return held([check for result in self.levels for check in result.checks]) is True

    @property
    def rows(self) -> tuple[Comparison, ...]:
        """All comparisons on the text, and engines that were compiled and not run."""
        return tuple(row for result in self.levels for row in result.comparisons)

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets in the order they appear, the reference models last."""
        names = dict.fromkeys(result.target for result in self.levels)
        return tuple(sorted(names, key=lambda name: name.startswith("pytorch-")))

    @property
    def failures(self) -> tuple[str, ...]:
        """What every failed check says, with its name in front."""
        return tuple(
            f"{result.target} {result.level} ({check.name}): {failure}"
            for result in self.levels
            for check in result.checks
            for failure in check.failures
        )

    def result(self, target: str, level: str) -> LevelResult | None:
        """What a level found about a target; None where it did not run."""
        return next((found for found in self.levels if (found.target, found.level) == (target, level)), None)

    def to_dict(self) -> dict[str, Any]:
        """The document of ``crt-export validate --json`` and of ``report.json``."""
        values = {entry.name: json_value(getattr(self, entry.name)) for entry in dataclasses.fields(self)}
        values["levels"] = [result.to_dict() for result in self.levels]
        return {"format": FORMAT, "format_version": FORMAT_VERSION, "passed": self.passed, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ParityReport:
        """Read what to_dict wrote.

        Raises:
            InputError: Another format or version, or keys are missing or unknown.
        """
        identity = values.get("format"), values.get("format_version")
        if identity != (FORMAT, FORMAT_VERSION):
            raise InputError(
                f"parity report: expected {FORMAT!r} of version {FORMAT_VERSION}, found {identity[0]!r} of version "
                f"{identity[1]!r}: use the crt-export that wrote it"
            )
        known = {entry.name for entry in dataclasses.fields(cls)}
        problems = [f"no {key!r}" for key in sorted({"levels", "tolerances", "text"} - set(values))]
        problems += [
            f"unknown key {key!r}" for key in sorted(set(values) - known - {"passed", "format", "format_version"})
        ]
        if problems:
            raise InputError(problem_list("parity report", problems))
        try:
            levels = tuple(LevelResult.from_dict(result) for result in values["levels"])
            notes = tuple(values.get("notes", ()))
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"parity report: a level cannot be read ({error})") from None
        rest = {key: value for key, value in values.items() if key in known - {"levels", "notes"}}
        return cls(levels=levels, notes=notes, **rest)


def held(checks: Sequence[Check]) -> bool | None:
    """None where nothing was gated, else whether every gate held."""
    gates = [check.passed for check in checks if check.passed is not None]
    return all(gates) if gates else None


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
