"""Checkpoints of the published sizes with random weights and their bundles, made once in a folder and used again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TARGETS = ("ort-cpu-fp32", "ort-cpu-int8")


@dataclass(frozen=True, kw_only=True)
class PresetFolder:
    """What a preset is measured from.

    Attributes:
        checkpoint: Folder with config.json and model.safetensors.
        bundle: Folder of a bundle with ``TARGETS``, not validated: random weights predict no text.
    """

    checkpoint: Path
    bundle: Path


def preset_folder(folder: Path, preset: str, say: Callable[[str], None] = lambda line: None) -> PresetFolder:
    """``folder/PRESET/checkpoint`` and ``folder/PRESET/bundle``; what is missing is made.

    Raises:
        subprocess.CalledProcessError: ``crt-export`` failed; it has said why.
    """
    place = PresetFolder(checkpoint=folder / preset / "checkpoint", bundle=folder / preset / "bundle")
    place.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if not (place.checkpoint / "config.json").is_file():
        say(f"{preset}: random weights")
        _crt_export(["init", "--preset", preset, "--seed", "0", "--output", str(place.checkpoint)])
    if not (place.bundle / "manifest.json").is_file():
        say(f"{preset}: build {' and '.join(TARGETS)}")
        targets = [word for target in TARGETS for word in ("--target", target)]
        _crt_export(["build", str(place.checkpoint), "--output", str(place.bundle), *targets, "--unvalidated"])
    return place


def _crt_export(words: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "crt_export", *words], check=True, stdout=subprocess.DEVNULL)
