"""What a probe did with an input: stage by stage accepted or refused, and what must never happen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

Result = TypeVar("Result")


class Finding(Exception):
    """Something that no input may cause; the text says what."""


@dataclass
class Stages:
    """Verdicts by stage, in order.

    Attributes:
        refusal: The errors that say no on purpose.
        verdicts: Stage to "accepted", "refused", or what it gave.
        reasons: Stage to the message of its refusal.
    """

    refusal: tuple[type[BaseException], ...]
    verdicts: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def run(self, stage: str, action: Callable[[], Result]) -> Result | None:
        """Run a stage; None where it refused.

        Raises:
            Finding: Another error came out than a deliberate one, or a deliberate one without a message.
        """
        try:
            result = action()
        except self.refusal as error:
            self.verdicts[stage] = "refused"
            self.reasons[stage] = str(error)[:300]
            if not str(error).strip():
                raise Finding(f"{stage}: {type(error).__name__} without a message") from error
            return None
        except Finding:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Finding(f"{stage}: {type(error).__module__}.{type(error).__name__}: {error}"[:600]) from error
        self.verdicts[stage] = "accepted"
        return result

    def give(self, stage: str, value: object) -> None:
        """Note what a stage gave, to be compared between languages."""
        self.verdicts[stage] = repr(value)[:200]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"verdicts": self.verdicts, "reasons": self.reasons}
