"""Results of a self-test, target by target, and as cases of a JUnit file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from crt_export.report.junit import JUnitCase

FORMAT = "crt-export selftest report"
FORMAT_VERSION = 1
EXIT_PASSED = 0
EXIT_OFF = 1
EXIT_NOT_RUN = 3


@dataclass(frozen=True, kw_only=True)
class TensorResult:
    """The largest error of one tensor in one replay.

    Attributes:
        tensor: ``logits``, ``state``, ``past_key_values.{layer}.key`` or ``.value``.
        largest: Largest |difference| over the largest |value| of the vectors.
        where: Where that is: after which step, at which position; empty where all are exact.
        limit: What ``largest`` may be.
    """

    tensor: str
    largest: float
    where: str
    limit: float


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """One replay of the vectors.

    Attributes:
        replay: ``step``, ``prefill``, ``prefill_pass`` or ``reset``.
        tensors: The largest error of every tensor.
        failures: Which tensor at which step is off; empty when none is.
    """

    replay: str
    tensors: tuple[TensorResult, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TargetResult:
    """One target.

    Attributes:
        target: Its name.
        status: ``passed``, ``failed``, or ``not run`` where this machine lacks what it needs.
        reason: What it lacks.
        replays: What was replayed.
    """

    target: str
    status: Literal["passed", "failed", "not run"]
    reason: str = ""
    replays: tuple[ReplayResult, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Sentences that name replay, tensor and step."""
        return tuple(f"{replay.replay}: {text}" for replay in self.replays for text in replay.failures)


@dataclass(frozen=True, kw_only=True)
class SelftestReport:
    """All targets of a bundle, or those that were asked for.

    Attributes:
        bundle: Identity of the bundle.
        validated: Whether the bundle was shown to agree with PyTorch when it was built.
        vectors: Metadata of the vectors.
        targets: The results.
        asked: Names of targets that were asked for; empty: all that run here.
    """

    bundle: str
    validated: bool
    vectors: Mapping[str, str]
    targets: tuple[TargetResult, ...]
    asked: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Sentences that name target, replay, tensor and step."""
        return tuple(f"{target.target}, {text}" for target in self.targets for text in target.failures)

    @property
    def passed(self) -> bool:
        """At least one target ran, every one that was asked for did, and none is off."""
        return self.exit_code == EXIT_PASSED

    @property
    def exit_code(self) -> int:
        """0 passed, 1 a target is off, 3 no target ran, or one that was asked for cannot run here."""
        statuses = {target.target: target.status for target in self.targets}
        if "failed" in statuses.values():
            return EXIT_OFF
        if "passed" not in statuses.values() or any(statuses[name] == "not run" for name in self.asked):
            return EXIT_NOT_RUN
        return EXIT_PASSED

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "passed": self.passed,
            "bundle": self.bundle,
            "validated": self.validated,
            "vectors": dict(self.vectors),
            "targets": [_target_dict(target) for target in self.targets],
        }


def _target_dict(target: TargetResult) -> dict[str, Any]:
    replays = [
        {
            "replay": replay.replay,
            # JSON has no NaN; what is not finite stands in the failures.
            "tensors": {
                tensor.tensor: {
                    "largest": tensor.largest if tensor.largest < float("inf") else None,
                    "where": tensor.where,
                    "limit": tensor.limit,
                }
                for tensor in replay.tensors
            },
            "failures": list(replay.failures),
        }
        for replay in target.replays
    ]
    return {"target": target.target, "status": target.status, "reason": target.reason, "replays": replays}


def junit_cases(report: SelftestReport) -> list[JUnitCase]:
    """A case per replay; a target that did not run is one skipped case, or a failed one where it was asked for."""
    from crt_export.report.junit import JUnitCase

    cases: list[JUnitCase] = []
    for target in report.targets:
        suite = f"{target.target} selftest"
        for replay in target.replays:
            cases.append(JUnitCase(suite=suite, name=replay.replay, failures=replay.failures))
        if target.status == "not run":
            reason = f"not run here: {target.reason}"
            asked = target.target in report.asked
            cases.append(
                JUnitCase(suite=suite, name="open", failures=(reason,) * asked, skipped=None if asked else reason)
            )
    return cases
