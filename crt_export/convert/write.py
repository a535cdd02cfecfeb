"""A checkpoint from a plan, tensor by tensor: header first, then each in blocks; complete or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from crt_export.bundle.exchange import replace_folder
from crt_export.checkpoint import INDEX_FILE, WEIGHTS_FILE
from crt_export.config import ModelConfig, read_config_file
from crt_export.convert.fold import Recipe
from crt_export.convert.folder import DTYPES, Source
from crt_export.convert.text import CARRIED
from crt_export.errors import CheckpointError, CrtExportError, InputError
from crt_export.folders import temporary_folder
from crt_export.models.registry import MODEL_TYPES
from crt_export.progress import Progress
from crt_export.user_files import sync_folder

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OWN_FILES = frozenset(("config.json", WEIGHTS_FILE, INDEX_FILE, *CARRIED))


def check_output(output: Path) -> Path:
    """Where a checkpoint will be, links followed.

    Raises:
        InputError: Something is there that is neither an empty folder nor a checkpoint that a new one may replace.
    """
    place = Path(os.path.realpath(output))
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return place
    if not place.is_dir():
        raise InputError(f"{output}: is a file; name a folder for the checkpoint")
    try:
        kind = read_config_file(place).get("model_type")
    except CrtExportError:
        kind = None
    if kind not in MODEL_TYPES:
        raise InputError(f"{output}: exists and is no checkpoint of this package; name a new folder")
    others = sorted(entry.name for entry in place.iterdir() if entry.name not in _OWN_FILES)
    if others:
        raise InputError(f"{output}: is a checkpoint and holds other files, such as {others[0]}; name a new folder")
    return place


def write_folder(
    place: Path,
    source: Source,
    config: ModelConfig,
    recipes: Mapping[str, Recipe],
    files: Mapping[str, bytes],
    progress: Progress,
) -> int:
    """Write the checkpoint and give it its name.

    Args:
        place: A free name, an empty folder or a checkpoint to replace, see :func:`check_output`.
        source: Where tensors are read from.
        config: Its configuration.
        recipes: Its tensors.
        files: What else lies in it.
        progress: Told of bytes written.

    Returns:
        Bytes of its tensors.

    Raises:
        InputError: The folder cannot be written.
        CheckpointError: A tensor of the source cannot be read or is not finite.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(place.parent, f".{place.name}.convert") as staging:
            made = staging / "checkpoint"
            made.mkdir()
            values = {key: value for key, value in config.to_dict().items() if value is not None}
            (made / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            for name, content in files.items():
                (made / name).write_bytes(content)
            size = _write_tensors(made / WEIGHTS_FILE, source, recipes, progress)
            sync_folder(made)
            replace_folder(made, place, staging / "previous")
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error.strerror}); name another folder") from error
    return size


def _write_tensors(file: Path, source: Source, recipes: Mapping[str, Recipe], progress: Progress) -> int:
    header, total = _header(source, recipes)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        done = 0
        for name, recipe in sorted(recipes.items()):
            for block in _checked(name, recipe, source):
                stream.write(block)
                done += len(block)
                progress("convert tensors", done, total)
        stream.flush()
        with suppress(OSError):  # not every file system can
            os.fsync(stream.fileno())
    return total


def _header(source: Source, recipes: Mapping[str, Recipe]) -> tuple[bytes, int]:
    """Header of safetensors, padded so that the values begin at a multiple of 8 bytes, and how many bytes they are."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, recipe in sorted(recipes.items()):
        dtype = _dtype(source, recipe)
        size = math.prod(recipe.shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(recipe.shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8), end


def _dtype(source: Source, recipe: Recipe) -> torch.dtype:
    return recipe.dtype(source.tensors[recipe.sources[0]].dtype if recipe.sources else None)


def _checked(name: str, recipe: Recipe, source: Source) -> Iterator[memoryview]:
    """The bytes of a tensor, block by block, every value finite."""
    dtype, values = _dtype(source, recipe), 0
    for block in recipe.blocks(source.read):
        if not bool(torch.isfinite(block).all()):
            where = f" (made of {recipe.sources[0]})" if recipe.sources else ""
            raise CheckpointError(f"{source.path}: tensor {name}{where} has values that are NaN or infinite")
        values += block.numel()
        assert block.dtype == dtype, name
        yield block.flatten().view(torch.uint8).numpy().data
    assert values == math.prod(recipe.shape), name
