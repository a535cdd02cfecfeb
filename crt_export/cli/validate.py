"""``crt-export validate``: compare a bundle with PyTorch once more, here."""

from __future__ import annotations

from pathlib import Path

import click

from crt_export.cli.console import ProgressLine, reserved_stdout, write_json, write_text
from crt_export.cli.options import PATH, json_option, require_one_text, text_options, validation_tokens_option
from crt_export.cli.tables import write_parity_table


@click.command()
@click.argument("bundle", type=PATH)
@text_options
@click.option("--target", "targets", multiple=True, metavar="NAME", help="Only this target; may be repeated.")
@click.option("--checkpoint", type=PATH, metavar="DIR", help="The reference, for a bundle without one.")
@validation_tokens_option
@json_option
def validate(
    bundle: Path,
    text: Path | None,
    tokens: Path | None,
    targets: tuple[str, ...],
    checkpoint: Path | None,
    validation_tokens: int,
    as_json: bool,
) -> None:
    """Compare every graph of BUNDLE that runs here with PyTorch FP32; exit code 1 if one does not agree."""
    require_one_text(text, tokens)
    from crt_export.parity import ParityOptions, validate_bundle

    with reserved_stdout(as_json), ProgressLine() as progress:
        report = validate_bundle(
            bundle,
            text=text,
            tokens=tokens,
            targets=targets,
            checkpoint=checkpoint,
            options=ParityOptions(validation_tokens=validation_tokens),
            progress=progress,
        )
    if as_json:
        write_json(report.to_dict())
    else:
        write_parity_table(report.to_dict())
        write_text("parity: passed" if report.passed else "parity: FAILED")
    if not report.passed:
        raise click.exceptions.Exit(1)
