"""``crt-export init``: a checkpoint of a published size with random weights."""

from __future__ import annotations

from pathlib import Path

import click

from crt_export.cli.console import write_json, write_text
from crt_export.cli.options import PATH, json_option


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
    from crt_export.presets import write_preset

    config = write_preset(preset, output, seed=seed)
    if as_json:
        write_json({"path": str(output), "preset": preset, "seed": seed, "parameters": config.parameter_count})
    else:
        write_text(f"{output}: {preset}, {config.parameter_count:,} parameters, seed {seed}")
