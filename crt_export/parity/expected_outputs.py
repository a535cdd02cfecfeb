"""``--expect FILE.safetensors``: what the user's own PyTorch model gave for token ids, and how far ours is off."""

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
from crt_export.models.base import LanguageModel

EXACT = "exact"
Passes = str | int
_ROWS = 256  # whose logits are made at once
#: One token has no neighbour: attention over it alone looks at no position and no key but its own.
_FEWEST_POSITIONS = 2
_KIND = "a safetensors file with input_ids int64 [n], logits float32 [n, vocab] and, if you like, hidden [n, hidden]"
_DTYPES = {"input_ids": "I64", "logits": "F32", "hidden": "F32"}
_FIXES = {
    "I64": "save it with .to(torch.int64)",
    "F32": "run your model in float32, model.float(), on a CPU, and save what it gives: rounding of 16 bits would hide "
    "a wrong configuration",
}
_Layout = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpectedOutputs:
    """Outputs of the user's own model for one sequence from its start, read completely and found consistent.

    Attributes:
        sha256: Content hash of the file.
        input_ids: What the model was fed, all of it, int64 [n].
        logits: What it gave after each token, float32 [n, vocab].
        hidden: h_t of each token: the output of the last layer, which is the recurrent state, before the final norm;
            float32 [n, hidden]. None where the file has none.
        passes: How the logits were computed: ``exact``, the recurrence token by token; a number of parallel passes K;
            None where the file does not say.
    """

    sha256: str
    input_ids: Tensor
    logits: Tensor
    hidden: Tensor | None
    passes: Passes | None

    @property
    def positions(self) -> int:
        """Number of tokens n."""
        return len(self.input_ids)

    @cached_property
    def deviation(self) -> float:
        """Standard deviation of a row of the logits, mean over the positions: the unit of differences."""
        return _spread(self.logits)

    @torch.no_grad()
    def logit_differences(self, model: LanguageModel, h: Tensor) -> Tensor:
        """Largest |logit difference| at each position of h, in deviations of the expected logits; float64 [n]."""
        parts = zip(h.split(_ROWS), self.logits[: len(h)].split(_ROWS), strict=True)
        worst = [(model.head(part).double() - wanted.double()).abs().amax(dim=-1) for part, wanted in parts]
        return torch.cat(worst) / self.deviation

    def hidden_difference(self, h: Tensor) -> float:
        """Largest |difference| of the hidden states at any position, in deviations of the expected ones."""
        assert self.hidden is not None
        worst = (h.double() - self.hidden.double()).abs().amax(dim=-1) / _spread(self.hidden)
        return float(worst.amax())


@torch.no_grad()
def run_model(model: LanguageModel, ids: Tensor, passes: Passes) -> Tensor:
    """h of one sequence from its start, [n, hidden]: the exact recurrence, or that many parallel passes."""
    if passes == EXACT and model.carried.iterated:
        return model.sequential(ids[None])[0].hidden[0]
    return model.unroll(ids[None], 1 if passes == EXACT else int(passes))[0].hidden[0]


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
            passes = (reader.metadata() or {}).get("passes")
            slices = {name: reader.get_slice(name) for name in sorted(reader.keys())}
            layout = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            problems = [*_layout_problems(layout, config), *_passes_problems(passes)]
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
    passes = passes if passes in (None, EXACT) else int(passes)
    return ExpectedOutputs(sha256=sha256, passes=passes, **{"hidden": None, **tensors})


def _layout_problems(layout: _Layout, config: ModelConfig) -> Iterator[str]:
    """Names, dtypes and shapes."""
    yield from (f"unexpected tensor {name!r}; known: {', '.join(_DTYPES)}" for name in layout if name not in _DTYPES)
    sizes = layout.get("input_ids", ("", ()))[1]
    count = sizes[0] if len(sizes) == 1 else None  # None where input_ids is no list of tokens
    widths = {"input_ids": (), "logits": (config.vocab_size,), "hidden": (config.hidden_size,)}
    for name, wanted in _DTYPES.items():
        if name in layout:
            dtype, shape = layout[name]
            if dtype != wanted:
                yield f"{name} has dtype {dtype}, expected {wanted}: {_FIXES[wanted]}"
            if shape != (count, *widths[name]):
                yield _shape_problem(name, shape, (count, *widths[name]))
        elif name != "hidden":
            yield f"missing tensor {name!r}"
    if count is not None and count < _FEWEST_POSITIONS:
        yield f"input_ids has {count} tokens, expected at least {_FEWEST_POSITIONS}; 64 or more say something"
    if count is not None and count > config.max_position_embeddings:
        yield f"input_ids has {count} tokens, above max_position_embeddings {config.max_position_embeddings}"


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


def _passes_problems(found: str | None) -> Iterator[str]:
    if found in (None, EXACT) or (re.fullmatch("[1-9][0-9]{0,3}", found) and int(found) <= MOST_PASSES):
        return
    yield (
        f"metadata passes is {found!r:.60}, expected {EXACT!r} (token by token) or a number of parallel passes, "
        f"1 to {MOST_PASSES}"
    )


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


def _spread(values: Tensor) -> float:
    """Mean over the positions of the standard deviation of a row: the unit of every difference."""
    return float(values.double().std(dim=-1, correction=0).mean())
