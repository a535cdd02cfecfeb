"""``crt-export validate``: compare a bundle with PyTorch once more, here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from crt_export.cli.console import ProgressLine, reserved_stdout, write_json
from crt_export.cli.options import (
    PATH,
    command_line,
    expect_option,
    full_option,
    json_option,
    junit_option,
    now,
    require_one_text,
    text_options,
    validation_tokens_option,
)
from crt_export.cli.tables import write_next, write_report_tables, write_summary, write_verdict
from crt_export.parity.levels import LEVELS, LONG_RUN, ONE_STEP, OWN_MODEL, VALIDATE_LEVELS


@click.command()
@click.argument("bundle", type=PATH)
@expect_option
@text_options
@click.option("--target", "targets", multiple=True, metavar="NAME", help="Only this target; may be repeated.")
@click.option("--checkpoint", type=PATH, metavar="DIR", help="The reference, for a bundle without one.")
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.Choice([*LEVELS, "all"]),
    help="Only this level of the ladder; may be repeated. Default: all but long-run.",
)
@validation_tokens_option
@click.option(
    "--window", type=int, default=256, show_default=True, metavar="N", help="Tokens per window, at least 256."
)
@click.option(
    "--long-run-tokens", type=int, metavar="N", help="Tokens of the long-run level, at least 2000. Default: 20480."
)
@click.option("--report", type=PATH, metavar="FILE.json", help="Write the report: all figures, as --json prints them.")
@click.option("--html", type=PATH, metavar="FILE.html", help="Write the report for readers, one file with plots.")
@junit_option
@click.option("--save-outputs", type=PATH, metavar="DIR", help="Save one-step's tensors for Polygraphy's tools.")
@full_option
@json_option
def validate(
    bundle: Path,
    expect: Path | None,
    text: Path | None,
    tokens: Path | None,
    targets: tuple[str, ...],
    checkpoint: Path | None,
    levels: tuple[str, ...],
    validation_tokens: int,
    window: int,
    long_run_tokens: int | None,
    report: Path | None,
    html: Path | None,
    junit: Path | None,
    save_outputs: Path | None,
    full: bool,
    as_json: bool,
) -> None:
    """Compare every graph of BUNDLE that runs here with PyTorch FP32; exit code 1 if one does not agree.

    The levels, from the files to the regimes: contract, one-step, chain, corpus, free-running, certificate, long-run;
    and before them, with --expect, own-model: whether PyTorch FP32 computes what your own model does.
    """
    require_one_text(text, tokens)
    chosen = _levels(levels, expect)
    _require_level(chosen, LONG_RUN, "--long-run-tokens", given=long_run_tokens is not None)
    _require_level(chosen, ONE_STEP, "--save-outputs", given=save_outputs is not None)
    from crt_export.parity import ParityOptions, validate_bundle
    from crt_export.parity.windows import LONG_RUN_TOKENS
    from crt_export.report.output import ReportFiles, check_outputs

    files, read = ReportFiles(report=report, html=html, junit=junit), [bundle, text, tokens, checkpoint, expect]
    files.check(inputs=read)
    check_outputs([], inputs=read, folder=save_outputs)
    with reserved_stdout(as_json), ProgressLine() as progress:
        found = validate_bundle(
            bundle,
            text=text,
            tokens=tokens,
            targets=targets,
            checkpoint=checkpoint,
            options=ParityOptions(
                validation_tokens=validation_tokens,
                window=window,
                levels=chosen,
                long_run_tokens=LONG_RUN_TOKENS if long_run_tokens is None else long_run_tokens,
            ),
            saved_outputs=save_outputs,
            expect=expect,
            progress=progress,
        )
        found = dataclasses.replace(found, created=now(), command=command_line())
        files.write(found, bundle=bundle.resolve().name)
    if as_json:
        write_json(found.to_dict())
    else:
        write_verdict(found)
        write_summary(found)
        if full:
            write_report_tables(found)
        if report is None and html is None:
            write_next(f"crt-export validate {bundle} --report report.json --html report.html")
        write_verdict(found)
    if not found.passed:
        raise click.exceptions.Exit(1)


def _levels(chosen: tuple[str, ...], expect: Path | None) -> tuple[str, ...]:
    if "all" in chosen:
        return LEVELS if expect is not None else LEVELS[1:]
    if OWN_MODEL in chosen and expect is None:
        raise click.UsageError(f"the level {OWN_MODEL} compares with your own model: add --expect FILE.safetensors")
    return tuple(name for name in LEVELS if name in chosen) or VALIDATE_LEVELS


def _require_level(levels: tuple[str, ...], needed: str, option: str, *, given: bool) -> None:
    """Refuse an option that would be ignored."""
    if given and needed not in levels:
        raise click.UsageError(f"{option} is for the level {needed}, which does not run: add --level {needed}")
