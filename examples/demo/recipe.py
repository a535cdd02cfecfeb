"""``training.toml``: text, architecture and schedule of the demo, read once and checked."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

from crt_export.config import ModelConfig
from crt_export.errors import InputError, problem_list

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the demo is trained. Lengths are in tokens (bytes), learning rates per step."""

    steps: int
    seed: int
    batch: int
    sequence: int
    fewest_passes: int
    most_passes: int
    convergence_weight: float
    peak_learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    gradient_clip: float
    initial_deviation: float

    def __post_init__(self) -> None:
        """Refuse sizes with which no step can be taken."""
        positive = ("steps", "batch", "sequence", "peak_learning_rate", "gradient_clip", "initial_deviation")
        problems = [f"{name} must be greater than 0" for name in positive if getattr(self, name) <= 0]
        if not 2 <= self.fewest_passes <= self.most_passes:
            problems.append("passes must satisfy 2 <= fewest_passes <= most_passes")
        if problems:
            raise InputError(problem_list("training recipe", problems))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training configuration and the texts it names (token ids, int64 [bytes])."""

    path: Path
    sha256: str
    config: ModelConfig
    schedule: Schedule
    train: torch.Tensor
    heldout: torch.Tensor


def load_recipe(path: Path = HERE / "training.toml") -> Recipe:
    """Read the file and the two texts beside it.

    Raises:
        InputError: A text is missing or is not the one whose SHA-256 the file gives.
        CheckpointError: The architecture is impossible.
    """
    content = path.read_bytes()
    values = tomllib.loads(content.decode())
    texts = values["text"]
    train, heldout = (
        _read_text(path.parent / texts[name]["file"], texts[name]["sha256"]) for name in ("train", "heldout")
    )
    return Recipe(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        config=ModelConfig.from_dict(values["model"]),
        schedule=Schedule(**values["schedule"] | {"betas": tuple(values["schedule"]["betas"])}),
        train=train,
        heldout=heldout,
    )


def _read_text(path: Path, sha256: str) -> torch.Tensor:
    if not path.is_file():
        raise InputError(f"{path}: text of the demo is missing")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(f"{path}: expected SHA-256 {sha256}, found {found}; restore the committed text")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
