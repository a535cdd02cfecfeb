"""``--expect FILE.safetensors``: what the user's own PyTorch model gave for some token ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crt_export.config import MOST_PASSES, ModelConfig
from crt_export.errors import InputError, problem_list
from crt_export.model import Model

EXACT = "exact"
Passes = str | int
_ROWS = 256  # whose logits are made at once
#: One token has no neighbour: attention over it alone looks at no position and no key but its own.
FEWEST_POSITIONS = 2
_KIND = "a safetensors file with input_ids int64 [n], logits float32 [n, vocab] and, if you like, hidden [n, hidden]"
_KEYS = {"input_ids": "I64", "logits": "F32", "hidden": "F32"}
_OPTIONAL = ("hidden",)
_FIXES = {
    "I64": "save it with .to(torch.int64)",
    "F32": "run your model in float32, model.float(), on a CPU, and save what it gives: rounding of 16 bits would hide "
    "a wrong configuration",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpectedOutputs:
    """Outputs of the user's own model for one sequence from its start, read completely and found consistent.

    Attributes:
        path: The file.
        sha256: Content hash of the file.
        input_ids: What the model was fed, all of it, int64 [n].
        logits: What it gave after each token, float32 [n, vocab].
        hidden: h_t of each token: the output of the last layer, which is the recurrent state, before the final norm;
            float32 [n, hidden]. None where the file has none.
        passes: How the logits were computed: ``exact``, the recurrence token by token; a number of parallel passes K;
            None where the file does not say.
    """

    path: Path
    sha256: str
    input_ids: Tensor
    logits: Tensor
    hidden: Tensor | None
    passes: str | int | None

    @property
    def positions(self) -> int:
        """Number of tokens n."""
        return len(self.input_ids)

    @cached_property
    def deviation(self) -> float:
        """Standard deviation of a row of the logits, mean over the positions: the unit of differences."""
        return _spread(self.logits)

    @cached_property
    def hidden_deviation(self) -> float:
        """The same of the hidden states."""
        assert self.hidden is not None
        return _spread(self.hidden)


def read_expected_outputs(path: Path, config: ModelConfig) -> ExpectedOutputs:
    """Read the file and hold it against the model's sizes.

    Args:
        path: The file.
        config: The checkpoint's.

    Raises:
        InputError: The file is unreadable, or tensors are missing, unknown, misshapen, of another dtype, not finite or
            outside the vocabulary; lists all problems.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "something else" if path.exists() else "nothing"
        raise InputError(f"{path}: expected {_KIND}, found {found}")
    try:
        with safe_open(path, framework="pt") as reader:
            metadata = reader.metadata() or {}
            slices = {name: reader.get_slice(name) for name in sorted(reader.keys())}
            layout = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            problems = [*_layout_problems(layout, config), *_passes_problems(metadata)]
            if problems:  # before gigabytes of them are read
                raise InputError(problem_list(str(path), problems))
            tensors = {name: reader.get_tensor(name) for name in layout}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: expected {_KIND}, found something unreadable ({error})") from None
    problems = [*_value_problems(tensors, config)]
    if problems:
        raise InputError(problem_list(str(path), problems))
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return ExpectedOutputs(
        path=path,
        sha256=sha256,
        input_ids=tensors["input_ids"],
        logits=tensors["logits"],
        hidden=tensors.get("hidden"),
        passes=_passes(metadata),
    )


def _layout_problems(layout: Mapping[str, tuple[str, tuple[int, ...]]], config: ModelConfig) -> Iterator[str]:
    """Names, dtypes and shapes."""
    for name in layout:
        if name not in _KEYS:
            yield f"unexpected tensor {name!r}; known: {', '.join(_KEYS)}"
    count = _count(layout)
    widths = {"input_ids": (), "logits": (config.vocab_size,), "hidden": (config.hidden_size,)}
    for name, wanted in _KEYS.items():
        if name not in layout:
            if name not in _OPTIONAL:
                yield f"missing tensor {name!r}"
            continue
        dtype, shape = layout[name]
        if dtype != wanted:
            yield f"{name} has dtype {dtype}, expected {wanted}: {_FIXES[wanted]}"
        if shape != (count, *widths[name]):
            yield _shape_problem(name, shape, (count, *widths[name]))
    if count is not None and count < FEWEST_POSITIONS:
        yield f"input_ids has {count} tokens, expected at least {FEWEST_POSITIONS}; 64 or more say something"
    if count is not None and count > config.max_position_embeddings:
        yield f"input_ids has {count} tokens, above max_position_embeddings {config.max_position_embeddings}"


def _count(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> int | None:
    """n, as input_ids has it; None where it is no list of tokens."""
    _, shape = layout.get("input_ids", ("", ()))
    return shape[0] if len(shape) == 1 else None


def _shape_problem(name: str, shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> str:
    words = ", ".join("n" if size is None else str(size) for size in wanted)
    fix = ""
    if len(shape) == len(wanted) + 1 and shape[0] == 1:
        fix = f": take the batch off, {name}[0]"
    elif name == "logits" and len(shape) == 2 and shape[1] != wanted[1]:
        fix = ": the last dim is config.json's vocab_size"
    elif len(shape) == len(wanted) and shape[1:] == wanted[1:]:
        fix = ": one row per token of input_ids"
    return f"{name} has shape {list(shape)}, expected [{words}]{fix}"


def _value_problems(tensors: Mapping[str, Tensor], config: ModelConfig) -> Iterator[str]:
    ids = tensors["input_ids"]
    outside = ((ids < 0) | (ids >= config.vocab_size)).nonzero()
    if len(outside):
        first = int(outside[0])
        yield (
            f"input_ids has {len(outside)} ids outside the vocabulary [0, {config.vocab_size}), the first is "
            f"{int(ids[first])} at position {first}"
        )
    for name in (name for name in ("logits", "hidden") if name in tensors):
        rows = (~torch.isfinite(tensors[name])).any(dim=-1).nonzero()
        if len(rows):
            yield f"{name} is NaN or infinite in {len(rows)} rows, the first at position {int(rows[0])}"
        elif _spread(tensors[name]) == 0:
            yield f"{name} has rows of one value only: there is nothing to compare"


def _passes_problems(metadata: Mapping[str, str]) -> Iterator[str]:
    found = metadata.get("passes", EXACT)
    if found != EXACT and not (re.fullmatch("[1-9][0-9]{0,3}", found) and int(found) <= MOST_PASSES):
        yield (
            f"metadata passes is {found!r:.60}, expected {EXACT!r} (token by token) or a number of parallel passes, "
            f"1 to {MOST_PASSES}"
        )


def _spread(values: Tensor) -> float:
    """Mean over the positions of the standard deviation of a row: the unit of every difference."""
    return float(values.double().std(dim=-1, correction=0).mean())


def _passes(metadata: Mapping[str, str]) -> str | int | None:
    found = metadata.get("passes")
    return found if found in (None, EXACT) else int(found)


@torch.no_grad()
def run_model(model: Model, ids: Tensor, passes: Passes) -> Tensor:
    """h of one sequence from its start, [n, hidden]: the exact recurrence, or that many parallel passes."""
    if passes == EXACT and model.correction is not None:
        return model.sequential(ids[None])[0][0]
    return model.unroll(ids[None], 1 if passes == EXACT else int(passes))[0][0]


@torch.no_grad()
def logit_differences(model: Model, h: Tensor, expected: ExpectedOutputs) -> Tensor:
    """Largest |logit difference| at each position of h, in deviations of the expected logits; float64 [n]."""
    parts = zip(h.split(_ROWS), expected.logits[: len(h)].split(_ROWS), strict=True)
    worst = [(model.head(part).double() - wanted.double()).abs().amax(dim=-1) for part, wanted in parts]
    return torch.cat(worst) / expected.deviation


def hidden_differences(h: Tensor, expected: ExpectedOutputs) -> Tensor:
    """The same of the hidden states, in deviations of the expected ones; float64 [n]."""
    assert expected.hidden is not None
    return (h.double() - expected.hidden[: len(h)].double()).abs().amax(dim=-1) / expected.hidden_deviation
