"""The logger handed to TensorRT: keeps what decides over a build, forwards the rest to nobody.

The builder logs thousands of lines. Kept are warnings, errors and the detailed layer list. Native code calls the
logger, possibly from its own threads, and cannot take an exception from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crt_export.engine.tensorrt_api import Api, ILogger


@dataclass(frozen=True, kw_only=True)
class AllowedWarning:
    """A builder warning that does not fail the build, and why."""

    pattern: str
    reason: str


ALLOWED_WARNINGS = (
    AllowedWarning(
        pattern=r"Make sure (?:input|output) \S+ has Int64 binding\.",
        reason="token ids and positions are int64 by contract, and the runtimes bind int64 buffers",
    ),
)


@dataclass
class BuildLog:
    """What was logged during one build, in order."""

    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    layer_text: str = ""

    def unexpected_warnings(self, allowed: Sequence[AllowedWarning] = ALLOWED_WARNINGS) -> list[str]:
        """Return the warnings that no entry of the allowlist covers."""
        patterns = [re.compile(rf"(?:\[[^\]]*\] |\S+\.cpp:\d+: )*{entry.pattern}") for entry in allowed]
        return [w for w in self.warnings if not any(pattern.fullmatch(w.strip()) for pattern in patterns)]


def logger_from_log(api: Api, log: BuildLog) -> ILogger:
    """Make a ``trt.ILogger`` that writes into ``log``; keep it alive as long as anything it was given to."""
    errors = (api.ILogger.Severity.ERROR, api.ILogger.Severity.INTERNAL_ERROR)

    class Logger(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)  # pybind11 refuses super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                log.errors.append(message)
            elif severity == api.ILogger.Severity.WARNING:
                log.warnings.append(message)
            elif severity == api.ILogger.Severity.VERBOSE and message.startswith("Layers:"):
                log.layer_text = message

    return Logger()
