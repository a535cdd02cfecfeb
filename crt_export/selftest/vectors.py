"""The vectors of a bundle, ``selftest/vectors.safetensors``: what PyTorch FP32 computed for a few tokens.

A prompt of P tokens and then S teacher-forced steps, in several runs: ``recurrence`` is the exact recurrence from the
first token on; ``prefill.k{K}.chunk{N}`` takes the prompt in K parallel passes over chunks of at most N tokens, which
is another function of the tokens, and goes on by steps. There is one of these for every distinct pair of passes and
chunk among the targets. Index 0 is after the prompt, index i after step i, so a run has S + 1 of everything:

=======================================  ===========================  ==================================================
``input_ids``                            int64 [P + S]                the tokens
``{run}.logits.{i}``                     float32 [columns]            logits; after the prompt and after the last step
                                                                      all columns, at the steps between every
                                                                      ``logit_stride``-th from ``i % logit_stride`` on
``{run}.state``, ``{run}.state.{name}``  float32 [S + 1, *shape]      recurrent states, if the model has any
``{run}.next_tokens``                    int64 [S + 1]                argmax of all logits
``{run}.margins``                        float32 [S + 1]              how far the second best logit is below the best
``{run}.past_key_values.{l}.key|value``  float32 [heads, P + S,       keys and values of all tokens
                                         head_dim]
``value_divisors.{precision}.{l}``       float32 [heads, head_dim]    powers of two that the values of this precision's
                                                                      targets are divided by (SmoothQuant trades scale
                                                                      between v and o); absent where they are not
=======================================  ===========================  ==================================================

The metadata (strings) are ``format`` ("crt-export selftest vectors"), ``format_version`` ("1"), ``sha256`` as in
snapshots (:mod:`crt_export.runtime.tensor_file`), ``generator`` ("crt-export 0.1.0"), ``torch`` (its version),
``checkpoint`` (the content hash of the checkpoint), ``ids`` (where the tokens are from: "validation text",
"packaged text" or "random"), ``seed`` (of random ones, else empty), ``prompt`` (P), ``steps`` (S), ``logit_stride``,
and ``limits``: JSON, per precision the largest |difference| that the self-test allows, over the largest |value| of
the tensor in all steps of the run. It stands in the file because a deployed machine has no other place for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crt_export.errors import BundleError, problem_list
from crt_export.models.declaration import STATE, ModelInfo
from crt_export.runtime.tensor_file import TensorFileKind, read_tensor_file, tensor_file_bytes

VECTORS_FILE = "selftest/vectors.safetensors"
VECTORS = TensorFileKind(
    format="crt-export selftest vectors",
    version=1,
    title="a file of self-test vectors",
    required=("generator", "torch", "checkpoint", "ids", "seed", "prompt", "steps", "logit_stride", "limits"),
)
RECURRENCE = "recurrence"
_COUNTS = {"prompt": 1, "steps": 0, "logit_stride": 1}


def prefill_run(unroll: int, chunk: int) -> str:
    """Name of the run whose prompt goes through K passes over chunks of at most ``chunk`` tokens."""
    return f"prefill.k{unroll}.chunk{chunk}"


def divisor_name(precision: str, cache: int) -> str:
    """Name of the tensor that says what a precision divides the values of a cache by."""
    return f"value_divisors.{precision}.{cache}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Vectors:
    """Checked vectors; equal ones have equal bytes.

    Attributes:
        metadata: Strings but for ``format``, ``format_version`` and ``sha256``, see the module.
        tensors: By name, see the module.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, np.ndarray]

    @property
    def prompt(self) -> int:
        """Tokens of the prompt, P."""
        return int(self.metadata["prompt"])

    @property
    def steps(self) -> int:
        """Teacher-forced steps after it, S."""
        return int(self.metadata["steps"])

    @property
    def input_ids(self) -> np.ndarray:
        """The tokens, int64 [P + S]."""
        return self.tensors["input_ids"]

    @property
    def checkpoint(self) -> str:
        """Content hash of the checkpoint they were made of."""
        return self.metadata["checkpoint"]

    @property
    def limits(self) -> dict[str, float]:
        """Largest relative error by precision."""
        return json.loads(self.metadata["limits"])

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs, sorted."""
        return tuple(
            sorted(name.removesuffix(".next_tokens") for name in self.tensors if name.endswith(".next_tokens"))
        )

    def columns(self, index: int) -> slice:
        """Which logits are stored at an index."""
        stride = int(self.metadata["logit_stride"])
        return slice(None) if index in (0, self.steps) else slice(index % stride, None, stride)

    def scale(self, run: str, tensor: str) -> float:
        """Largest |value| of a tensor in a run, of all its steps: what an error is relative to."""
        names = [f"{run}.{tensor}.{index}" for index in range(self.steps + 1)] if tensor == "logits" else []
        largest = [float(np.abs(self.tensors[name]).max(initial=0.0)) for name in names or [f"{run}.{tensor}"]]
        return max(*largest, float(np.finfo(np.float32).tiny))

    def to_bytes(self) -> bytes:
        """The content of the file."""
        return tensor_file_bytes(VECTORS, self.metadata, self.tensors)


def load_vectors(file: Path, model: ModelInfo, checkpoint: str, content: bytes | None = None) -> Vectors:
    """Read and check a file.

    Args:
        file: The file.
        model: The model it must be for.
        checkpoint: Content hash of the checkpoint it must be made of.
        content: Its content, where that was read and checked before; None opens the file.

    Raises:
        BundleError: It is missing, damaged, something else or of a newer format version; it was made of another
            checkpoint; tensors are missing, unknown, of another dtype or shape, or not finite. Lists every problem of a
            kind.
    """
    metadata, tensors = read_tensor_file(VECTORS, file, content)
    vectors = Vectors(metadata=metadata, tensors=tensors)
    problems = [*_metadata_problems(metadata, checkpoint)]
    problems = problems or [*_shape_problems(vectors, model)] or [*_value_problems(vectors, model)]
    if problems:
        raise BundleError(
            problem_list(f"the self-test vectors {file} cannot be used; build the bundle again", problems)
        )
    return vectors


def _metadata_problems(metadata: Mapping[str, str], checkpoint: str) -> Iterator[str]:
    if metadata["checkpoint"] != checkpoint:
        yield (
            f"they were made of the checkpoint {metadata['checkpoint']:.16}, the bundle of {checkpoint:.16} "
            "(content hashes)"
        )
    for key, least in _COUNTS.items():
        value = metadata[key]
        if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) >= least):
            yield f"metadata {key} must be a whole number of at least {least}, found {value!r:.80}"
    try:
        limits = json.loads(metadata["limits"])
    except (ValueError, RecursionError):
        limits = None
    if not isinstance(limits, dict) or not all(_is_limit(value) for value in limits.values()):
        yield f"metadata limits must be a JSON object of numbers above 0, found {metadata['limits']!r:.80}"


def _is_limit(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)


def _shape_problems(vectors: Vectors, model: ModelInfo) -> Iterator[str]:
    if RECURRENCE not in vectors.runs:
        yield f"they hold no run {RECURRENCE!r}"
    if vectors.steps > len(vectors.tensors):  # names of that many steps would fill the memory
        yield f"metadata steps is {vectors.steps}, but the file has {len(vectors.tensors)} tensors"
        return
    expected = _expected(vectors, model)
    yield from (f"{name} is missing" for name in expected if name not in vectors.tensors)
    yield from (f"{name} is unknown" for name in vectors.tensors if name not in expected)
    for name, (dtype, shape) in expected.items():
        found = vectors.tensors.get(name)
        if found is not None and (found.dtype != dtype or found.shape != shape):
            yield f"{name} must be {dtype} {list(shape)}, found {found.dtype} {list(found.shape)}"


def _expected(vectors: Vectors, model: ModelInfo) -> dict[str, tuple[str, tuple[int, ...]]]:
    steps, tokens, vocab = vectors.steps, vectors.prompt + vectors.steps, model.vocab_size
    expected: dict[str, tuple[str, tuple[int, ...]]] = {"input_ids": ("int64", (tokens,))}
    for precision in vectors.limits:
        if divisor_name(precision, 0) in vectors.tensors:
            expected |= {
                divisor_name(precision, index): ("float32", (cache.heads, cache.head_dim))
                for index, cache in enumerate(model.carried.caches)
            }
    for run in vectors.runs:
        for index in range(steps + 1):
            columns = len(range(vocab)[vectors.columns(index)])
            expected[f"{run}.logits.{index}"] = ("float32", (columns,))
        for spec in model.carried.states:
            expected[f"{run}.{spec.tensor(STATE)}"] = ("float32", (steps + 1, *spec.shape))
        expected[f"{run}.next_tokens"] = ("int64", (steps + 1,))
        expected[f"{run}.margins"] = ("float32", (steps + 1,))
        for index, cache in enumerate(model.carried.caches):
            for kind in ("key", "value"):
                shape = (cache.heads, tokens, cache.head_dim)
                expected[f"{run}.past_key_values.{index}.{kind}"] = ("float32", shape)
    return expected


def _value_problems(vectors: Vectors, model: ModelInfo) -> Iterator[str]:
    for name, values in vectors.tensors.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            yield f"{name} is not finite"
        if name.startswith("value_divisors.") and not (values > 0).all():
            yield f"{name} must be above 0"
        if values.dtype.kind == "i" and ((values < 0) | (values >= model.vocab_size)).any():
            yield f"{name} holds tokens outside the vocabulary (0 to {model.vocab_size - 1})"
