"""``crt-export bench``: how fast a bundle is, against the memory and against others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from crt_export.cli.console import ProgressLine, reserved_stdout, write_json, write_table, write_text
from crt_export.cli.options import PATH, PassesType, command_line, json_option, now, require_one_text, text_options


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--target", default="", metavar="NAME", help="Default: the first target that runs here.")
@click.option(
    "--against",
    multiple=True,
    metavar="NAME|BUNDLE",
    help="Runs in turns with it: another target, pytorch-eager, pytorch-compile, pytorch-dynamic-int8, or the same "
    "target of another bundle; may be repeated.",
)
@click.option("--position", "positions", type=int, multiple=True, metavar="N", help="Tokens in the cache. Default: 64.")
@click.option("--prompt-tokens", type=int, multiple=True, metavar="N", help="Length of a prompt. Default: 16 and 64.")
@click.option(
    "--passes",
    multiple=True,
    type=PassesType(),
    metavar="K|adaptive|exact",
    help="Also feed prompts in K parallel passes, in as many as they need, or exactly; may be repeated.",
)
@text_options
@click.option(
    "--rounds",
    "--turns",
    "rounds",
    type=int,
    default=10,
    show_default=True,
    metavar="N",
    help="Blocks of steps of everybody.",
)
@click.option("--steps", type=int, default=0, metavar="N", help="Steps of a block. Default: 20, fewer in small caches.")
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Rows.")
@click.option("--threads", type=int, metavar="N", help="CPU threads, 0 for every core. Default: the target's.")
@click.option("--output", type=PATH, metavar="FILE.json", help="Write the report, as --json prints it.")
@click.option("--html", type=PATH, metavar="FILE.html", help="Write the report for readers, one file with plots.")
@json_option
def bench(
    bundle: Path,
    target: str,
    against: tuple[str, ...],
    positions: tuple[int, ...],
    prompt_tokens: tuple[int, ...],
    passes: tuple[int | str, ...],
    text: Path | None,
    tokens: Path | None,
    rounds: int,
    steps: int,
    batch: int,
    threads: int | None,
    output: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast BUNDLE runs: load, step, prompt, memory, and how far that is from the memory's bandwidth.

    Everything that is compared runs in turns, each in a process of its own, so that a machine's drift cancels. Prompts
    are the beginning of --text, of the text of the demo without it, and random ids for a model without a tokenizer.
    """
    require_one_text(text, tokens)
    from crt_export.bench.options import BenchOptions
    from crt_export.bench.run import run_bench
    from crt_export.report.output import ReportFiles

    options = BenchOptions(
        target=target,
        against=against,
        positions=positions,
        prompt_tokens=prompt_tokens,
        passes=passes,
        rounds=rounds,
        steps=steps,
        batch=batch,
        text=text,
        tokens=tokens,
        threads=threads,
    )
    files = ReportFiles(report=output, html=html)
    files.check(inputs=[bundle, text, tokens])
    with reserved_stdout(as_json), ProgressLine() as progress:
        document = run_bench(bundle, options, created=now(), command=command_line(), progress=progress).to_dict()
    files.write(document)
    if as_json:
        write_json(document)
    else:
        write_bench(document)


def write_bench(document: Mapping[str, Any]) -> None:
    """Write everything that a benchmark says, in the words and tables of its page."""
    from crt_export.report.bench_page import page_from_bench

    page = page_from_bench(document)
    facts = dict(page.facts)
    write_text(f"{page.summary}\n{page.subtitle}")
    for name, rates in facts["Rates, p10 / p50 / p90"]:
        write_text(f"{name}, p10 / p50 / p90: {rates}")
    for table in page.tables:
        write_text("")
        first, *figures = table.columns
        write_table((first, *(f"{name}>" for name in figures)), table.rows, title=f"{table.heading}. {table.caption}")
    for name, reason in page.absent:
        write_text(f"not run: {name}: {reason}")
    for note in page.notes:
        write_text(f"note: {note}")
