"""Measure the demo: held-out byte perplexity by number of passes K and for the exact recurrence.

    python examples/demo/evaluate.py

Every consecutive 128-byte window of ``heldout.txt`` starts from nothing and predicts each next byte. The
windows are the unit of the paired 95 % interval of sequential against K = 10.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from recipe import HERE, load_recipe
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from crt_export import __version__
from crt_export.checkpoint import load_checkpoint
from crt_export.errors import CrtExportError
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint

PASSES = (1, 2, 3, 4, 5, 6, 8, 10, 16)
NORMAL_95 = 1.96
REPEAT = 64
FILE = click.Path(path_type=Path)


def windows_from_text(tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All consecutive windows and the byte that follows each of theirs, int64 [windows, length] each."""
    count = (len(tokens) - 1) // length
    ids, targets = tokens[: count * length], tokens[1 : count * length + 1]
    return ids.reshape(count, length), targets.reshape(count, length)


def windows_without_repeats(ids: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """Which windows share no run of ``REPEAT`` bytes with the training text, bool [windows].

    The documentation repeats passages: topics that contain one another are in both texts.
    """
    seen = bytes(train.tolist())
    runs = {seen[start : start + REPEAT] for start in range(len(seen) - REPEAT + 1)}
    rows = [bytes(row.tolist()) for row in ids]
    shared = [any(row[at : at + REPEAT] in runs for at in range(len(row) - REPEAT + 1)) for row in rows]
    return ~torch.tensor(shared)


@torch.no_grad()
def losses_by_regime(model: LanguageModel, ids: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean loss of each window in nat per byte, float64 [windows], by K and for ``sequential``."""
    losses, iterate = {}, None
    for passes in range(1, max(PASSES) + 1):
        done, _, _ = model.unroll(ids, 1, iterate=iterate)
        iterate = done.states
        if passes in PASSES:
            losses[str(passes)] = _losses(model, done.hidden, targets)
    return losses | {"sequential": _losses(model, model.sequential(ids)[0].hidden, targets)}


def _losses(model: LanguageModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model.head(hidden).double()
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)


def figures_from_losses(losses: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Perplexities, and the paired difference sequential - K=10 with the half-width of its 95 % interval."""
    perplexity = {regime: math.exp(values.mean().item()) for regime, values in losses.items()}
    difference = losses["sequential"] - losses["10"]
    half_width = NORMAL_95 * difference.std().item() / len(difference) ** 0.5
    return {
        "perplexity": perplexity,
        "sequential_minus_k10": {
            "nll": difference.mean().item(),
            "nll_half_width_95": half_width,
            "perplexity": perplexity["sequential"] - perplexity["10"],
            # d exp(x) = exp(x) dx, exact enough at differences this small
            "perplexity_half_width_95": perplexity["sequential"] * half_width,
        },
    }


def provenance() -> dict[str, Any]:
    """When, with what and on what the figures were measured."""
    return {
        "command": "python examples/demo/evaluate.py",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{_processor()}, {os.cpu_count()} cores",
        "versions": {
            "crt-export": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@click.command(help=__doc__)
@click.option("--checkpoint", type=FILE, default=HERE / "checkpoint", help="Checkpoint folder.")
@click.option("--output", type=FILE, default=HERE / "figures.json", help="File to write.")
def main(checkpoint: Path, output: Path) -> None:
    """Command line, see ``--help``."""
    console = Console()
    try:
        recipe, loaded = load_recipe(), load_checkpoint(checkpoint)
    except CrtExportError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(error.exit_code)
    length = recipe.schedule.sequence
    ids, targets = windows_from_text(recipe.heldout, length)
    losses = losses_by_regime(model_from_checkpoint(loaded), ids, targets)
    figures = figures_from_losses(losses)
    new = windows_without_repeats(ids, recipe.train)
    new_perplexity = math.exp(losses["sequential"][new].mean().item())
    unseen = {"repeat_bytes": REPEAT, "windows": int(new.sum()), "sequential_perplexity": new_perplexity}
    text = {"file": "heldout.txt", "windows": len(ids), "window_length": length, "tokens": ids.numel()}
    document = provenance() | {"checkpoint_sha256": loaded.sha256, "text": text} | figures
    document["without_repeats"] = unseen
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    console.print(f"{len(ids)} windows of {length} bytes, heldout.txt", highlight=False)
    table = Table("passes K", "byte perplexity")
    for regime, perplexity in figures["perplexity"].items():
        table.add_row(regime, f"{perplexity:.4f}")
    console.print(table)
    gap = figures["sequential_minus_k10"]
    console.print(
        f"sequential - K=10: {gap['perplexity']:+.5f} ± {gap['perplexity_half_width_95']:.5f} perplexity, "
        f"{gap['nll']:+.6f} ± {gap['nll_half_width_95']:.6f} nat (95 %)",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"sequential over the {unseen['windows']} windows that share no {REPEAT} bytes in a row with train.txt: "
        f"{new_perplexity:.4f}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
