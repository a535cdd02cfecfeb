"""``crt-export build`` and ``init``: a checkpoint becomes a validated bundle; a checkpoint of a published size."""

from __future__ import annotations

import time
from pathlib import Path

import click

from crt_export.cli.console import ProgressLine, reserved_stdout, write_json, write_message, write_text
from crt_export.cli.options import (
    PATH,
    expect_option,
    json_option,
    require_one_text,
    text_options,
    validation_tokens_option,
)
from crt_export.cli.tables import bundle_document, write_bundle, write_summary


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--output", type=PATH, required=True, metavar="DIR", help="Folder of the bundle.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME|FILE.toml",
    help="Where it shall run; may be repeated. Default: every target that runs or compiles on this machine.",
)
@expect_option
@text_options
@click.option("--capacity", type=int, metavar="N", help="Tokens that the KV cache holds.")
@click.option("--unroll", type=int, metavar="K", help="Passes of the prefill. Default: the checkpoint's unroll_steps.")
@validation_tokens_option
@click.option(
    "--short-validation",
    "short_reason",
    default="",
    metavar="REASON",
    help="Make every comparison on 512 tokens; the report says so, with your reason why that is enough.",
)
@click.option("--unvalidated", is_flag=True, help="Skip the comparison with PyTorch; loaders refuse the bundle.")
@click.option("--no-reference", is_flag=True, help="Leave the checkpoint out of the bundle.")
@click.option(
    "--cache",
    type=PATH,
    metavar="DIR",
    help="Reuse graphs and engines that earlier builds of this checkpoint stored here, checked by their hashes; at "
    "most 10 GiB, the least recently used go first, and it may be removed at any time. "
    "Default: crt-export/stages in $XDG_CACHE_HOME or ~/.cache.",
)
@click.option("--no-cache", is_flag=True, help="Make everything anew and store nothing.")
@json_option
def build(
    checkpoint: Path,
    output: Path,
    targets: tuple[str, ...],
    expect: Path | None,
    text: Path | None,
    tokens: Path | None,
    capacity: int | None,
    unroll: int | None,
    validation_tokens: int,
    short_reason: str,
    unvalidated: bool,
    no_reference: bool,
    cache: Path | None,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Build a bundle from CHECKPOINT, a folder with config.json and model.safetensors or its shards.

    The text calibrates INT8 targets and is what the built graphs are compared with PyTorch on.
    """
    require_one_text(text, tokens)
    from crt_export.bundle import open_bundle
    from crt_export.errors import ParityError
    from crt_export.parity import ParityReport
    from crt_export.pipeline import BuildOptions
    from crt_export.pipeline import build as build_bundle
    from crt_export.stages.store import default_folder

    if cache is not None and no_cache:
        raise click.UsageError("give --cache DIR or --no-cache, not both")
    options = BuildOptions(
        checkpoint=checkpoint,
        output=output,
        targets=targets,
        text=text,
        tokens=tokens,
        capacity=capacity,
        unroll=unroll,
        validated=not unvalidated,
        reference=not no_reference,
        validation_tokens=validation_tokens,
        short_reason=short_reason,
        expect=expect,
        cache=None if no_cache else cache or default_folder(),
    )
    started = time.monotonic()
    try:
        with reserved_stdout(as_json), ProgressLine() as progress:
            build_bundle(options, progress=progress)
    except ParityError as error:
        if as_json:
            write_json(error.report)
        else:
            write_summary(ParityReport.from_dict(error.report), failures=False)
        raise
    write_message(f"built in {time.monotonic() - started:.0f} s")
    bundle = open_bundle(output, allow_unvalidated=True)
    if as_json:
        write_json(bundle_document(bundle))
    else:
        write_bundle(bundle, output)


@click.command()
@click.option(
    "--preset",
    required=True,
    metavar="d5-1120|d1-2048|transformer-12x768|transformer-6x1088|tiny",
    help="Size: the published CRTs, the plain transformers the paper compares them with, or a small CRT.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="S", help="Seed of the random weights.")
@click.option("--output", type=PATH, required=True, metavar="DIR", help="Folder to make.")
@json_option
def init(preset: str, seed: int, output: Path, as_json: bool) -> None:
    """Write a randomly initialised checkpoint of a published size, to measure speed and memory with.

    Its vocabulary (32,000; tiny: 256) begins with the 256 bytes, so any text can be fed. What it writes is noise, which
    has no perplexity to agree on: build such a checkpoint with --unvalidated.
    """
    from crt_export.models.presets import write_preset

    config = write_preset(preset, output, seed=seed)
    if as_json:
        write_json({"path": str(output), "preset": preset, "seed": seed, "parameters": config.parameter_count})
    else:
        write_text(f"{output}: {preset}, {config.parameter_count:,} parameters, seed {seed}")
