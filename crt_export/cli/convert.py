"""``crt-export convert``: a Hugging Face model becomes a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from crt_export.cli.console import ProgressLine, reserved_stdout, write_json, write_message, write_text
from crt_export.cli.options import PATH, json_option
from crt_export.cli.tables import readable_size


@click.command()
@click.argument("source", type=PATH)
@click.option("--output", type=PATH, required=True, metavar="CHECKPOINT", help="Folder of the checkpoint.")
@click.option("--plain", is_flag=True, help="A plain transformer, without the correction that makes a CRT.")
@click.option(
    "--correction-size", type=int, metavar="N", help="Width of the correction. Default: 4 times the hidden size."
)
@click.option("--unroll", type=int, metavar="K", help="Passes that the CRT is to be trained for. Default: 3.")
@click.option("--max-positions", type=int, metavar="N", help="Positions of the checkpoint. Default: the source's.")
@json_option
def convert(
    source: Path,
    output: Path,
    plain: bool,
    correction_size: int | None,
    unroll: int | None,
    max_positions: int | None,
    as_json: bool,
) -> None:
    """Convert SOURCE, a Hugging Face folder or a GGUF file, into a checkpoint.

    The correction is zero until it is trained: the CRT computes what the source does. What cannot be converted exactly
    is refused.
    """
    from crt_export.convert import convert as convert_model

    with reserved_stdout(as_json), ProgressLine() as progress:
        made = convert_model(
            source,
            output,
            plain=plain,
            correction_size=correction_size,
            unroll=unroll,
            max_positions=max_positions,
            progress=progress,
        )
    for note in made.notes:
        write_message(f"note: {note}")
    if as_json:
        document = {
            "path": str(made.path),
            "source": str(source),
            "family": made.family,
            "parameters": made.config.parameter_count,
            "bytes": made.bytes,
            "folded": list(made.folded),
            "notes": list(made.notes),
            "config": made.config.to_dict(),
        }
        write_json(document)
        return
    kind = "plain transformer" if plain else "CRT with a correction of zero"
    count = f"{made.config.parameter_count:,} parameters, {readable_size(made.bytes)}"
    write_text(f"{made.path}: {made.family} as a {kind}, {count}")
