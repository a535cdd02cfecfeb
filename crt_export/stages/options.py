"""Options of a build, and what they come to for this checkpoint on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from crt_export.checked import Checked, Rules, whole
from crt_export.config import MOST_PASSES, ModelConfig
from crt_export.environment import target_status
from crt_export.errors import InputError, MissingDependencyError, problem_list
from crt_export.parity.windows import ParityOptions
from crt_export.profile import EngineProfile, list_profiles, load_profile
from crt_export.text import VALIDATION_TOKENS

#: Every check of a full validation, under the same limits, on an eighth of the tokens.
SHORT_VALIDATION: Mapping[str, Any] = MappingProxyType(
    {"validation_tokens": 512, "window": 64, "chain_windows": 2, "chain_steps": 16, "prompts": 4, "new_tokens": 8}
)


@dataclass(frozen=True, kw_only=True)
class BuildOptions(Checked):
    """Options of one build; the command line has one flag for each.

    Attributes:
        checkpoint: Folder with config.json and model.safetensors.
        output: Folder of the bundle; replaced only once the new bundle is complete.
        targets: Names of tracked profiles or paths of users' own; empty: all that run or compile on this machine.
        text: Held-out UTF-8 text for calibration and validation; None: the text that comes with the package.
        tokens: Instead of text, a .npy file of token ids.
        capacity: Tokens the cache holds; None: each profile's own, at most the model's max_position_embeddings.
        unroll: Passes K of the prefill; None: each profile's own, else the checkpoint's unroll_steps.
        validated: Compare with PyTorch before the bundle is written; without it loaders refuse the bundle.
        reference: Put the checkpoint into the bundle, so that it can be validated anywhere.
        validation_tokens: Tokens that every comparison scores.
        short_reason: Why a short validation (:data:`SHORT_VALIDATION`) is enough, for the report; empty: a full one.
        expect: Outputs of the user's own model that the reference must agree with before anything is made
            (:mod:`crt_export.parity.own_model`); None: the report says that it was not compared.
        cache: Folder of stages that earlier builds made (:mod:`crt_export.stages.store`); None makes all anew.

    Raises:
        InputError: A number is out of range.
    """

    HEADING: ClassVar[str] = "build options"
    RULES: ClassVar[Rules] = {
        "capacity": whole("at least 1 token", least=1, optional=True),
        "unroll": whole(f"1 to {MOST_PASSES} passes of the prefill", least=1, most=MOST_PASSES, optional=True),
        "validation_tokens": whole(f"at least {VALIDATION_TOKENS}", least=VALIDATION_TOKENS),
    }

    checkpoint: Path
    output: Path
    targets: tuple[str, ...] = ()
    text: Path | None = None
    tokens: Path | None = None
    capacity: int | None = None
    unroll: int | None = None
    validated: bool = True
    reference: bool = True
    validation_tokens: int = VALIDATION_TOKENS
    short_reason: str = ""
    expect: Path | None = None
    cache: Path | None = None

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """What excludes each other."""
        if values["short_reason"] and values.get("validation_tokens", VALIDATION_TOKENS) != VALIDATION_TOKENS:
            yield "give a number of validation tokens or the reason of a short validation, not both"
        if values["text"] is not None and values["tokens"] is not None:
            yield "give a text or token ids, not both"
        if values["expect"] is not None and not values["validated"]:
            yield "an unvalidated bundle has no report for the comparison with your own model: leave out one"

    @property
    def parity(self) -> ParityOptions:
        """How much the parity stage measures."""
        if self.short_reason:
            return ParityOptions(**SHORT_VALIDATION, short_reason=self.short_reason)
        return ParityOptions(validation_tokens=self.validation_tokens)


def profiles_from_options(options: BuildOptions, config: ModelConfig) -> tuple[EngineProfile, ...]:
    """The targets to build, each with its capacity and unroll fixed for this model.

    Raises:
        InputError: A target is unknown or named twice, or the capacity is beyond what the model can address.
        MissingDependencyError: A named target cannot be built on this machine, or none can.
    """
    if options.capacity is not None and options.capacity > config.max_position_embeddings:
        raise InputError(
            f"capacity {options.capacity} is above max_position_embeddings {config.max_position_embeddings} "
            "of the checkpoint: ask for less"
        )
    profiles = _named_profiles(options.targets) if options.targets else _default_profiles()
    return tuple(_resolved(profile, options, config) for profile in profiles)


def _named_profiles(targets: Sequence[str]) -> list[EngineProfile]:
    profiles = [load_profile(target) for target in targets]
    repeated = [name for name, count in Counter(profile.name for profile in profiles).items() if count > 1]
    if repeated:
        raise InputError(f"targets named more than once: {', '.join(repeated)}")
    missing = {
        profile.name: f"{profile.name} needs {', '.join(status.needs)}"
        for profile in profiles
        if (status := target_status(profile)).status == "needs" and not _builds_anywhere(profile)
    }
    if missing:
        message = problem_list("cannot be built on this machine", [*missing.values()])
        if len(missing) < len(profiles):
            message += f"\nnothing was built; leave out {' and '.join(missing)} and the rest builds"
        raise MissingDependencyError(message)
    return profiles


def _builds_anywhere(profile: EngineProfile) -> bool:
    """ONNX Runtime targets for a GPU are files only: they are written, and validated on the CPU provider."""
    return profile.runtime == "onnxruntime" and profile.device != "cpu"


def _default_profiles() -> list[EngineProfile]:
    found = [profile for profile in list_profiles() if target_status(profile).status != "needs"]
    if not found:
        raise MissingDependencyError(
            "no target runs or compiles on this machine: install a runtime, for example crt-export[cpu] or "
            "crt-export[rtx] (crt-export doctor tells what each target needs)"
        )
    return found


def _resolved(profile: EngineProfile, options: BuildOptions, config: ModelConfig) -> EngineProfile:
    capacity = options.capacity or min(profile.capacity, config.max_position_embeddings)
    unroll = options.unroll or profile.unroll or config.carried.passes
    return profile.with_capacity(capacity).with_unroll(unroll if config.carried.iterated else 1)
