"""Setup of a parity check: the files of every target and their contract, and what all targets are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from crt_export.bundle import BundleFiles
from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import ContractError
from crt_export.models.base import LanguageModel
from crt_export.parity.reference import Reference
from crt_export.parity.runner import Runner, Runners
from crt_export.parity.tolerances import Tolerance, Tolerances
from crt_export.parity.windows import ParityOptions, Windows
from crt_export.progress import Progress
from crt_export.quantize.plan import W8A8Plan
from crt_export.spec import GraphSpec, graph_spec
from crt_export.text import TokenText

HALF_PRECISIONS = ("fp16", "w8a8")
_ARITHMETIC = {"fp32": "fp32", "w8": "int8+fp32", "fp16": "fp32-emulated", "w8a8": "fp32-emulated"}


class TargetGraphs(Mapping[str, Path]):
    """ONNX file per graph name of a target, given out by the bundle when it is asked for."""

    def __init__(self, files: BundleFiles, names: Mapping[str, str]) -> None:
        """Name the files.

        Args:
            files: The opened bundle.
            names: File of the bundle per graph name.
        """
        self._files, self._names = files, dict(names)

    def __getitem__(self, graph: str) -> Path:
        return self._files.graph(self._names[graph])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """One target. Its graph files run on ONNX Runtime's CPU provider, whatever the target deploys on.

    Attributes:
        target: Name of the engine profile.
        runtime: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``: what the target deploys on.
        precision: ``fp32``, ``fp16``, ``w8`` or ``w8a8``.
        graphs: ONNX file per graph name; the very files that are deployed or compiled.
        unroll: Passes K of prefill.
        cache_dtype: ``float32`` or ``float16``.
        capacity: Cache length that the files are fixed to; None where it is dynamic.
        built_for: Most tokens of a row, for which the files have rotary angles; None: as many as the model has.
        chunk: Most tokens of one prefill call; None where nothing says.
        residual_dtype: Of the residual stream: ``float16`` or ``float32``.
        compiled: Names of the graphs for which an engine was compiled; listed, never passed.
        disabled_optimizers: ONNX Runtime rewrites to leave out.
        opener: Loads its deployed engine with so many threads, 0 for every core.
        plan: What the graphs of ``w8a8`` were made by; None in other precisions.
    """

    target: str
    runtime: str
    precision: str
    graphs: Mapping[str, Path]
    unroll: int
    cache_dtype: str
    capacity: int | None = None
    built_for: int | None = None
    chunk: int | None = None
    residual_dtype: str = "float32"
    compiled: tuple[str, ...] = ()
    disabled_optimizers: tuple[str, ...] = ()
    opener: Callable[[int], Runner] | None = field(default=None, repr=False)
    plan: W8A8Plan | None = None

    def __post_init__(self) -> None:
        """A plan is had by those that need it.

        Raises:
            ContractError: It lacks one, or has one that its graphs were not made by.
        """
        if (self.precision == "w8a8") != (self.plan is not None):
            found = f"{'no' if self.plan is None else 'a'} plan for {self.precision}"
            raise ContractError(f"target {self.target}: expected a plan for w8a8 and none for others, found {found}")

    @property
    def arithmetic(self) -> str:
        """What multiplies when the files run here; ``fp32-emulated`` hides FP16 overflow."""
        return _ARITHMETIC[self.precision]

    @property
    def half(self) -> bool:
        """Whether the graphs compute in FP16 where they are deployed."""
        return self.precision in HALF_PRECISIONS

    def value_divisors(self, config: ModelConfig) -> tuple[np.ndarray, ...]:
        """What its graphs divide the values in their caches by, per cache float32 [heads, 1, head_dim]."""
        if self.plan is None:
            return tuple(np.ones((cache.heads, 1, cache.head_dim), np.float32) for cache in config.carried.caches)
        return tuple(divisor[:, None] for divisor in self.plan.value_divisors(config))

    def room(self, config: ModelConfig) -> int:
        """Most tokens that a row can hold."""
        limits = (config.max_position_embeddings, self.built_for, self.capacity)
        return min(limit for limit in limits if limit is not None)

    def spec(self, graph: str, config: ModelConfig) -> GraphSpec:
        """The contract of one graph with this target's cache."""
        return graph_spec(graph, config, self.cache_dtype, self.capacity)


@dataclass(frozen=True, kw_only=True, eq=False)
class ParitySetup:
    """What every level is given besides the target.

    Attributes:
        checkpoint: The weights of the reference.
        reference: PyTorch FP32 on the windows; computes each regime once and keeps it.
        text: The held-out text that the windows are the start of.
        options: How much to measure.
        tolerances: The limits.
        progress: Told what runs.
        saved_outputs: Where the one-step level saves its tensors for Polygraphy's tools; None saves nothing.
        recorded_nll: How well the reference predicted the text of the bundle's own report, nats per token; None where
            there is no such report.
    """

    checkpoint: Checkpoint
    reference: Reference
    text: TokenText
    options: ParityOptions
    tolerances: Tolerances
    progress: Progress
    saved_outputs: Path | None = None
    recorded_nll: float | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.checkpoint.config

    @property
    def model(self) -> LanguageModel:
        """PyTorch FP32, in evaluation mode."""
        return self.reference.model

    @property
    def windows(self) -> Windows:
        """Consecutive windows of the text."""
        return self.reference.windows

    @property
    def threads(self) -> int:
        """CPU threads. PyTorch's count honours OMP_NUM_THREADS, so that checks side by side do not fight for cores."""
        return self.options.threads or torch.get_num_threads()

    @cached_property
    def runners(self) -> Runners:
        """The deployed engines of the targets, loaded when a level first asks for one."""
        return Runners(self.config, self.threads)

    def runner(self, case: ParityCase) -> Runner:
        """The deployed engine of a target.

        Raises:
            BundleError: A file is missing or differs from what was built.
            ContractError: A graph cannot be loaded or breaks the contract.
        """
        return self.runners.of(case)

    def limits(self, precision: str) -> Tolerance:
        """The limits of one precision."""
        return self.tolerances.precisions[precision]
