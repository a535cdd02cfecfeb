"""Conversion of Hugging Face models into checkpoints, with or without the correction that makes a CRT of them.

A conversion is right or refused: every key of ``config.json`` is known to mean what is computed here, and every tensor
of the files has its place. transformers is not imported; what it computes is computed in float32 to 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from crt_export.config import MOST_PASSES, ModelConfig
from crt_export.convert.families import FAMILIES, REFUSED
from crt_export.convert.folder import HuggingFaceFolder, Source
from crt_export.convert.plan import Correction, plan_conversion
from crt_export.convert.text import read_text
from crt_export.convert.write import check_output, write_folder
from crt_export.errors import CheckpointError, InputError
from crt_export.progress import Progress, Stages, no_progress

__all__ = ["DEFAULT_PASSES", "FAMILIES", "REFUSED", "Conversion", "convert", "open_source"]

#: ``unroll_steps`` of a CRT where nothing else is asked for; with a correction of zero any number computes the same.
DEFAULT_PASSES = 3
_STAGES = 3
#: Of what the caller chooses.
_MOST = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        path: The checkpoint.
        family: ``model_type`` of the source.
        config: Configuration of the checkpoint.
        bytes: Of its tensors.
        folded: Tensors that were computed, in float32; all others are the source's values in their own dtype.
        notes: What was left out, a sentence each.
    """

    path: Path
    family: str
    config: ModelConfig
    bytes: int
    folded: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    output: str | Path,
    *,
    plain: bool = False,
    correction_size: int | None = None,
    unroll: int | None = None,
    max_positions: int | None = None,
    progress: Progress = no_progress,
) -> Conversion:
    """Convert a Hugging Face folder, or a GGUF file, into a checkpoint folder; complete or not at all.

    Tensors are read and written one by one: the largest decides how much memory it takes.

    Args:
        source: Folder with ``config.json`` and safetensors, or a file that ends in ``.gguf``.
        output: Folder to make. It may exist if it is empty, or a checkpoint and nothing else, which is then replaced.
        plain: Make a plain transformer; else a CRT whose correction is zero, which computes the same until it is
            trained.
        correction_size: Width G of the correction; None for 4 times the hidden size.
        unroll: Passes K that the CRT declares; None for :data:`DEFAULT_PASSES`.
        max_positions: Positions of the checkpoint; None for as many as the source has.
        progress: Told what is being done.

    Raises:
        InputError: An option is unusable, or the output cannot be written.
        CheckpointError: The source is incomplete, damaged or contradicts itself.
        UnsupportedError: The source is understood, and not converted.
        MissingDependencyError: A package is needed that is not installed.
    """
    correction = _correction(plain, correction_size, unroll)
    _check_count("max_positions", max_positions)
    place = check_output(Path(output))
    stages = Stages(progress, _STAGES)
    stages.begin()
    stages("read configuration and headers", 0, 1)
    opened = open_source(source)
    plan = plan_conversion(opened, correction, max_positions)
    stages.begin()
    stages("read tokenizer", 0, 1)
    text = read_text(opened, plan.config.vocab_size)
    config = replace(plan.config, **text.keys)
    stages.begin()
    size = write_folder(place, opened, config, plan.recipes, text.files, stages)
    return Conversion(
        path=Path(output),
        family=plan.family,
        config=config,
        bytes=size,
        folded=tuple(name for name, recipe in plan.recipes.items() if recipe.folded),
        notes=text.notes,
    )


def open_source(source: str | Path) -> Source:
    """Open a folder or a GGUF file as the source of a conversion.

    Raises:
        CheckpointError: There is none, or it is damaged.
        UnsupportedError: It is of a kind that is not converted.
        MissingDependencyError: A GGUF file, and the ``gguf`` package is not installed.
    """
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        from crt_export.convert.gguf_file import GgufFile

        return GgufFile(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise CheckpointError(
            f"{path}: expected a Hugging Face folder with config.json and safetensors, found {found}; "
            "hf download NAME --local-dir FOLDER fetches one"
        )
    return HuggingFaceFolder(path)


def _correction(plain: bool, size: int | None, passes: int | None) -> Correction | None:
    if plain:
        given = [name for name, value in (("correction_size", size), ("unroll", passes)) if value is not None]
        if given:
            raise InputError(f"a plain transformer has no correction: leave out {' and '.join(given)}, or plain")
        return None
    _check_count("correction_size", size)
    _check_count("unroll", passes, MOST_PASSES)
    return Correction(size=size, passes=passes or DEFAULT_PASSES)


def _check_count(name: str, value: int | None, most: int = _MOST) -> None:
    if value is not None and not 1 <= value <= most:
        raise InputError(f"{name} must be from 1 to {most}, found {value}")
