"""``crt-export generate``: write text with a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from crt_export.cli.console import write_generated, write_message, write_text
from crt_export.cli.options import PATH, PassesType


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--prompt", required=True, metavar="TEXT", help="What the text begins with.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True, metavar="N")
@click.option("--target", default="", metavar="NAME", help="Default: the first target that runs here.")
@click.option("--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, metavar="K", help="0 keeps all tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True, metavar="P", help="1 keeps all tokens.")
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    show_default=True,
    metavar="P",
    help="Drop tokens less likely than this fraction of the likeliest.",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    metavar="R",
    help="Above 1 makes tokens of the prompt and of the new text less likely.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="S")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option(
    "--stop-token",
    "stop_tokens",
    multiple=True,
    metavar="ID|TEXT",
    help="End at this token, given by its id or by the text of a special token; may be given several times.",
)
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end-of-sequence tokens.")
@click.option(
    "--parse-special/--no-parse-special",
    default=True,
    show_default=True,
    help="Whether prompt text that spells a special token becomes that token, or is text like any other.",
)
@click.option(
    "--passes",
    type=PassesType(),
    default=None,
    help="How a recurrent model takes the prompt: in K parallel passes, in as many as their residual asks for, or "
    "exactly, token by token. Default: what the bundle chose for the target.",
)
def generate(
    bundle: Path,
    prompt: str,
    target: str,
    max_new_tokens: int,
    stop: tuple[str, ...],
    stop_tokens: tuple[str, ...],
    parse_special: bool,
    ignore_eos: bool,
    passes: int | Literal["adaptive", "exact"] | None,
    **sampling: Any,
) -> None:
    """Continue a prompt with BUNDLE.

    The new text is streamed to stdout; the prompt and a closing line of figures go to stderr.
    """
    from crt_export.runtime import GenerationOptions, SamplingOptions, generate_text, load_bundle

    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        sampling=SamplingOptions(**sampling),
        stop_tokens=[int(token) if token.isdecimal() else token for token in stop_tokens],
        stop_strings=stop,
        ignore_eos=ignore_eos,
        passes=passes,
    )
    _require_validated(bundle)
    with load_bundle(bundle) as opened:
        generation = generate_text(opened, prompt, options, target=target, parse_special=parse_special)
        write_message(prompt, newline=False)
        for piece in generation:
            write_generated(piece)
        write_text("")
    result = generation.result
    by = "" if result.stopped_by is None else f" {result.stopped_by!r}"
    write_message(f"[{result.target}: {result.new_tokens} tokens, ended by {result.stop_reason}{by}]")


def _require_validated(bundle: Path) -> None:
    """What the loader refuses too, in the words of the command line."""
    from crt_export.bundle import open_bundle
    from crt_export.errors import BundleError

    if not open_bundle(bundle, allow_unvalidated=True).manifest["validated"]:
        raise BundleError(
            f"{bundle} is not validated: its agreement with PyTorch was never shown; build it again without "
            "--unvalidated ('crt-export validate' shows whether it agrees)"
        )
