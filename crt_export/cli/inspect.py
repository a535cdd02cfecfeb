"""``crt-export inspect``: what a bundle or a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crt_export.cli.console import write_json, write_message, write_text
from crt_export.cli.options import PATH, full_option, json_option
from crt_export.cli.tables import Speed, bundle_document, readable_size, speed_from_bench, write_bundle

if TYPE_CHECKING:
    from crt_export.bundle import BundleFiles


@click.command()
@click.argument("path", type=PATH, metavar="BUNDLE|CHECKPOINT|SOURCE")
@click.option("--verify", is_flag=True, help="Hash every file of a bundle (a checkpoint is always read whole).")
@click.option(
    "--bench",
    type=PATH,
    metavar="BENCH.json",
    help="Show the ms a token that crt-export bench measured of this bundle. Default: BUNDLE.bench.json beside it.",
)
@click.option(
    "--capacity", type=int, default=1024, show_default=True, metavar="N", help="Tokens of the caches of a row."
)
@full_option
@json_option
def inspect(path: Path, verify: bool, bench: Path | None, capacity: int, full: bool, as_json: bool) -> None:
    """Show what a bundle or a checkpoint holds, and check it.

    Of a Hugging Face folder or a GGUF file: what it is, and whether `convert` converts it. Of all: the memory of state
    and caches; a bundle's targets have their own capacities.
    """
    if _is_source(path):
        _inspect_source(path, capacity, as_json)
    elif not _is_checkpoint(path):
        _inspect_bundle(path, bench, verify=verify, full=full, as_json=as_json)
    elif bench is not None:
        raise click.UsageError("--bench is for a bundle: a checkpoint has no targets to be measured")
    else:
        _inspect_checkpoint(path, capacity, as_json)


def _is_checkpoint(path: Path) -> bool:
    return (path / "config.json").exists() and not (path / "manifest.json").exists()


def _is_source(path: Path) -> bool:
    """Whether it is a model of somebody else's format; a folder whose config.json is damaged is a checkpoint's."""
    if path.suffix == ".gguf" and path.is_file():
        return True
    if (path / "adapter_config.json").exists():
        return True
    if not _is_checkpoint(path):
        return False
    from crt_export.config import read_config_file
    from crt_export.errors import CheckpointError
    from crt_export.models.registry import MODEL_TYPES

    try:
        config = read_config_file(path)
    except CheckpointError:
        return False
    # our own files name their tokenizer, theirs the version of transformers
    return config.get("model_type") not in MODEL_TYPES and "tokenizer" not in config and "model_type" in config


def _inspect_source(path: Path, capacity: int, as_json: bool) -> None:
    from crt_export.convert.describe import describe

    document = describe(path, capacity)
    if as_json:
        write_json(document)
        return
    write_text(f"{path}: {document['kind']}, model_type {document['model_type']}")
    if not document["converts"]:
        write_text(f"does not convert: {document['reason']}")
        return
    dtypes = ", ".join(document["dtypes"])
    write_text(f"converts: {document['parameters']:,} parameters, {dtypes}, {document['positions']:,} positions")
    write_text(f"a row holds {_row_text(document, 'state as a CRT')}")
    for note in document["notes"]:
        write_text(f"note: {note}")


def _row_text(document: Mapping[str, Any], state: str) -> str:
    """Memory of a row in words."""
    sizes = [readable_size(document[name]) for name in ("state_bytes", "cache_bytes_float32", "cache_bytes_float16")]
    caches = f"{sizes[1]} of caches of {document['capacity']:,} tokens in float32, {sizes[2]} in float16"
    return f"{sizes[0]} of {state}, and {caches}"


def _inspect_bundle(path: Path, given: Path | None, *, verify: bool, full: bool, as_json: bool) -> None:
    from crt_export.bundle import open_bundle

    bundle = open_bundle(path, allow_unvalidated=True)
    if verify:
        bundle.verify_all()
    speed, note = _speed(bundle, given)
    if as_json:
        write_json({**bundle_document(bundle), "verified": verify, "speed": speed and speed.to_dict()})
        return
    if verify:
        write_text(f"verified: all {len(bundle.names)} files are as they were built")
    if note:
        write_message(f"note: {note}")
    write_bundle(bundle, path, speed=speed, full=full)


def _speed(bundle: BundleFiles, given: Path | None) -> tuple[Speed | None, str]:
    """What was measured of a bundle; one that lies beside it and does not fit is left out, and the note says why."""
    from crt_export.errors import CrtExportError
    from crt_export.report.reading import bench_of_bundle, bench_path

    path = given or bench_path(bundle.path)
    if given is None and not path.is_file():
        return None, ""
    try:
        return speed_from_bench(bench_of_bundle(bundle, path), path), ""
    except CrtExportError as error:
        if given is not None:
            raise
        return None, f"no ms a token is shown: {error}"


def _inspect_checkpoint(path: Path, capacity: int, as_json: bool) -> None:
    from crt_export.checkpoint import checkpoint_files, load_checkpoint
    from crt_export.errors import InputError, MissingDependencyError
    from crt_export.tokenizer import load_tokenizer

    if capacity < 1:
        raise InputError(f"capacity must be at least 1, found {capacity}")
    checkpoint = load_checkpoint(path)
    capacity = min(capacity, checkpoint.config.max_position_embeddings)
    unchecked = ""
    try:
        load_tokenizer(path, checkpoint.config)
    except MissingDependencyError as error:  # the weights can be shown without it
        unchecked = str(error)
    size = sum((path / name).stat().st_size for name in checkpoint_files(path))
    document = {
        "kind": "checkpoint",
        "path": str(path),
        "bytes": size,
        "sha256": checkpoint.sha256,
        "dtypes": list(checkpoint.stored_dtypes),
        "parameters": checkpoint.config.parameter_count,
        "config": checkpoint.config.to_dict(),
        "tokenizer_checked": not unchecked,
        "capacity": capacity,
        **checkpoint.config.carried.row_bytes(capacity),
    }
    if unchecked:
        write_message(f"tokenizer not checked: {unchecked}")
    if as_json:
        write_json(document)
    else:
        _write_checkpoint(document)


def _write_checkpoint(document: dict[str, Any]) -> None:
    dtypes, size = ", ".join(document["dtypes"]), readable_size(document["bytes"])
    write_text(f"{document['path']}: {document['parameters']:,} parameters, {dtypes}, {size}")
    write_text(f"sha256 {document['sha256']}")
    write_text(f"a row holds {_row_text(document, 'state')}")
    for key, value in document["config"].items():
        write_text(f"  {key} = {value}")
