"""The candidates of the GPU benchmark: which there are, what keeps one from running, and how each is made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from bound_step import BoundStep, write_step
from static_step import StaticStep, random_model

from crt_export.bench.static_model import StaticModel
from crt_export.models.presets import PRESETS

EAGER, CUDA_GRAPH, ONNXRUNTIME = "pytorch-eager", "pytorch-cuda-graph", "onnxruntime-cuda-graph"
BACKENDS = (EAGER, CUDA_GRAPH, ONNXRUNTIME)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: CRT, transformer, and the ratio of their speeds that the paper reports (A100, eager, bf16, batch 1).
PAIRS: tuple[tuple[str, str, float | None], ...] = (
    ("d5-1120", "transformer-12x768", 1.74),
    ("d1-2048", "transformer-6x1088", 2.6),
)


class Step(Protocol):
    """What is timed: decodes one token at the position it was moved to."""

    def __call__(self) -> None: ...

    def seek(self, position: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured.

    Attributes:
        device: ``cuda``, or ``cpu`` to try the benchmark itself.
        pairs: CRT, transformer, published ratio (None: there is none).
        backends: Of ``BACKENDS``.
        dtypes: Of ``DTYPES``; ONNX Runtime runs in fp16 (on a CPU in fp32) only.
        batches: Sequences.
        contexts: Tokens in the caches, the one that is decoded included.
        rounds: Blocks of each candidate.
        steps: Timed steps of a block.
    """

    device: str = "cuda"
    pairs: tuple[tuple[str, str, float | None], ...] = PAIRS
    backends: tuple[str, ...] = BACKENDS
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    batches: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] = (128, 1024, 4096)
    rounds: int = 12
    steps: int = 20


class CapturedStep:
    """A step as a CUDA graph: launched whole, on the same buffers."""

    def __init__(self, step: StaticStep) -> None:
        self._step = step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.inference_mode():
            step()

    def seek(self, position: int) -> None:
        self._step.seek(position)

    def __call__(self) -> None:
        self._graph.replay()


def make_step(
    backend: str, model: StaticModel, graph: Callable[[], Path], *, grid: Grid, batch: int, context: int
) -> Step:
    """One candidate at the last position of its context.

    Raises:
        MissingDependencyError: ONNX Runtime is absent or has no provider for the device.
        RuntimeError: The device or the runtime refuses.
    """
    cuda = grid.device == "cuda"
    step: Step
    if backend == ONNXRUNTIME:
        step = BoundStep(graph(), device=grid.device, batch=batch, context=context, captured=cuda)
    else:
        masked = backend == CUDA_GRAPH
        static = StaticStep(model, batch=batch, context=context, masked=masked)
        static.seek(context - 1)
        step = CapturedStep(static) if masked else static
    step.seek(context - 1)
    return step


Candidates = Mapping[str, tuple[StaticModel, Callable[[], Path]]]


@contextmanager
def models_and_graphs(presets: tuple[str, ...], dtype: str, device: str) -> Iterator[Candidates]:
    """By preset: the model on the device, and what exports its step graph when it is first asked for."""
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as folder:
        exported: dict[str, Path] = {}
        models = {name: random_model(PRESETS[name], dtype=DTYPES[dtype], device=device) for name in presets}

        def exporter(name: str) -> Callable[[], Path]:
            def graph() -> Path:
                place = Path(folder) / name
                if name not in exported:
                    place.mkdir(exist_ok=True)
                    exported[name] = write_step(PRESETS[name], place, dtype=DTYPES[dtype])
                return exported[name]

            return graph

        yield {name: (model, exporter(name)) for name, model in models.items()}


def obstacle(backend: str, dtype: str, grid: Grid, context: int, candidates: Candidates) -> str:
    """Why a cell cannot run, before it is tried; empty where it may."""
    longest = min(model.config.max_position_embeddings for model, _graph in candidates.values())
    if context > longest:
        return f"the models have positions for {longest} tokens"
    if backend == CUDA_GRAPH and grid.device != "cuda":
        return "a CUDA graph needs an NVIDIA GPU"
    wanted = "fp16" if grid.device == "cuda" else "fp32"
    if backend == ONNXRUNTIME and dtype != wanted:
        return f"the exported graph runs in {wanted} here"
    return ""
