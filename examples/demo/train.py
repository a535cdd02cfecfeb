"""Train the demo: a one-layer context-ready transformer on bytes of Python's documentation, minutes on a CPU.

    python examples/demo/train.py

Ctrl-C saves the state of the training; the same command with ``--resume`` continues as if never interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from recipe import HERE, Recipe, Schedule, load_recipe
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F

from crt_export.checkpoint import write_checkpoint
from crt_export.errors import CrtExportError, InputError
from crt_export.models.base import LanguageModel
from crt_export.models.layers import LayerNorm
from crt_export.models.registry import model_class, tensors_from_model

SAVE_EVERY = 100
FILE = click.Path(path_type=Path)
STATE_FILE = HERE.parents[1] / "build" / "demo-training.pt"


class Training:
    """Model, optimiser, learning rate and random numbers: all that one more step depends on."""

    def __init__(self, recipe: Recipe, schedule: Schedule) -> None:
        self.recipe, self.schedule, self.step = recipe, schedule, 0
        self.generator = torch.Generator().manual_seed(schedule.seed)
        self.model = model_class(recipe.config.model_type)(recipe.config)
        self.model.reset_tables()
        initialise(self.model, schedule.initial_deviation, self.generator)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=schedule.peak_learning_rate,
            betas=schedule.betas,
            weight_decay=schedule.weight_decay,
        )
        self.rate = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, schedule.peak_learning_rate, schedule.steps, cycle_momentum=False
        )

    def advance(self) -> tuple[float, int]:
        """Take one step; returns its cross-entropy in nat and the number of passes it drew."""
        schedule, model = self.schedule, self.model
        passes = self._draw(schedule.fewest_passes, schedule.most_passes + 1, 1).item()
        starts = self._draw(0, len(self.recipe.train) - schedule.sequence, schedule.batch)
        windows = self.recipe.train[starts[:, None] + torch.arange(schedule.sequence + 1)]
        ids, targets = windows[:, :-1], windows[:, 1:]

        before, _, _ = model.unroll(ids, int(passes) - 1)
        last, _, _ = model.unroll(ids, 1, iterate=before.states)
        entropy = F.cross_entropy(model.head(last.hidden).flatten(0, 1), targets.flatten())
        change = F.mse_loss(last.hidden, before.hidden.detach())

        self.optimizer.zero_grad(set_to_none=True)
        (entropy + schedule.convergence_weight * change).backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.gradient_clip)
        self.optimizer.step()
        self.rate.step()
        self.step += 1
        return entropy.item(), int(passes)

    def _draw(self, low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=self.generator)

    def save(self, path: Path) -> None:
        """Write the state beside ``path`` and move it there, so that a state file is always complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        state = self._identity() | {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rate": self.rate.state_dict(),
            "generator": self.generator.get_state(),
        }
        try:
            torch.save(state, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Continue from a saved state.

        Raises:
            InputError: There is none, or it belongs to another recipe, seed or number of steps.
        """
        if not path.is_file():
            raise InputError(f"{path}: no training state to resume; start without --resume")
        state: dict[str, Any] = torch.load(path, weights_only=True)
        changed = [name for name, value in self._identity().items() if state.get(name) != value]
        if changed:
            raise InputError(f"{path}: belongs to a training with another {' and '.join(changed)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rate.load_state_dict(state["rate"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def _identity(self) -> dict[str, Any]:
        return {"recipe": self.recipe.sha256, "schedule": asdict(self.schedule)}


def initialise(model: LanguageModel, deviation: float, generator: torch.Generator) -> None:
    """Normal weights, zero biases, LayerNorm gains of one, as GPT-2 starts."""
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif isinstance(module, LayerNorm):
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, deviation, generator=generator)


class Interrupt:
    """Ctrl-C asks the loop to stop after the step at hand; a second one stops at once."""

    def __enter__(self) -> Interrupt:
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)


def run(training: Training, state: Path, stop_after: int, report: Callable[[float, int], None]) -> bool:
    """Step to the end; False if interrupted or at ``stop_after``, with the state saved."""
    with Interrupt() as interrupt:
        while training.step < training.schedule.steps:
            report(*training.advance())
            stopped = interrupt.asked or training.step == stop_after
            if stopped or training.step % SAVE_EVERY == 0:
                training.save(state)
            if stopped and training.step < training.schedule.steps:
                return False
    return True


@click.command(help=__doc__)
@click.option("--output", type=FILE, default=HERE / "checkpoint", help="Checkpoint folder.")
@click.option("--state", type=FILE, default=STATE_FILE, help="State of an unfinished training.")
@click.option("--resume", is_flag=True, help="Continue from the saved state.")
@click.option("--steps", type=click.IntRange(min=2), help="Steps of the whole training, instead of training.toml's.")
@click.option("--seed", type=int, help="Seed, instead of training.toml's.")
@click.option("--stop-after", type=int, default=0, help="Save the state and stop after this step.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; all by default.")
def main(
    output: Path,
    state: Path,
    resume: bool,
    steps: int | None,
    seed: int | None,
    stop_after: int,
    threads: int | None,
) -> None:
    """Command line, see ``--help``."""
    console = Console(stderr=True)
    if threads:
        torch.set_num_threads(threads)
    changes = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    try:
        recipe = load_recipe()
        training = Training(recipe, replace(recipe.schedule, **changes))
        if resume:
            training.load(state)
        elif state.exists():
            raise InputError(f"{state}: an unfinished training; continue it with --resume or delete the file")
        finished = _run_with_progress(training, state, stop_after, console)
        if not finished:
            console.print(f"stopped after step {training.step}; continue with --resume", highlight=False)
            sys.exit(0 if training.step == stop_after else 130)
        write_checkpoint(output, recipe.config, tensors_from_model(training.model))
        state.unlink(missing_ok=True)
    except CrtExportError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(error.exit_code)
    console.print(f"wrote {output}", highlight=False)


def _run_with_progress(training: Training, state: Path, stop_after: int, console: Console) -> bool:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=training.schedule.steps, completed=training.step)

        def report(entropy: float, passes: int) -> None:
            progress.update(task, advance=1, description=f"{entropy:.3f} nat, K={passes}")
            if not console.is_terminal and training.step % SAVE_EVERY == 0:
                console.print(f"step {training.step}: {entropy:.3f} nat, K={passes}", highlight=False)

        return run(training, state, stop_after, report)


if __name__ == "__main__":
    main()
