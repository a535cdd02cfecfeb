"""PyTorch as a candidate: eager, compiled, or with dynamically quantised linears."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear

from crt_export.bench.generic_model import GenericModel
from crt_export.bench.report import KINDS
from crt_export.bench.runner import CandidateInfo, Passes, StepTimes, block_start, prompt_rows
from crt_export.bench.static_model import StaticModel, is_classic, model_from_tensors
from crt_export.checkpoint import find_weight_files, load_checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import UnsupportedError
from crt_export.models.presets import random_tensors

_SEED = 1
#: torch.compile compiles one graph for every so many tokens; attention reads them all, masked beyond the position.
BUCKET = 128
EAGER, COMPILE, DYNAMIC_INT8 = KINDS[1:4]

#: Recurrent state, whatever a model has: a tensor, or tensors by name.
Carry = Any
Stepper = Callable[[Tensor, Carry, int], tuple[Tensor, Tensor, Carry]]
Model = StaticModel | GenericModel


class PyTorchRunner:
    """One model, float32, on the CPU; see :class:`crt_export.bench.runner.Runner`."""

    def __init__(
        self,
        kind: str,
        config: ModelConfig,
        reference: Path | None,
        *,
        batch: int,
        capacity: int,
        threads: int,
        text: Sequence[int] = (),
    ) -> None:
        """Set the threads; nothing is loaded yet.

        Args:
            kind: One of ``EAGER``, ``COMPILE``, ``DYNAMIC_INT8``.
            config: The model's configuration.
            reference: The checkpoint's folder; None takes random weights of the same sizes.
            batch: Rows.
            capacity: Tokens that the caches hold.
            threads: CPU threads.
            text: Token ids that prompts are made of; none: random ones.
        """
        torch.set_num_threads(threads)
        self._kind, self._config, self._reference = kind, config, reference
        self._batch, self._capacity, self._text = batch, capacity, text
        self._prefixes: dict[int, tuple[Tensor, Carry, tuple[Tensor, ...]]] = {}
        self._compiled: set[int] = set()

    def weight_path(self) -> Path | None:
        """The file with the weights, of several shards the largest, which stands for all."""
        return max(self._weight_files(), key=lambda path: path.stat().st_size, default=None)

    def _weight_files(self) -> list[Path]:
        folder = self._reference
        return [] if folder is None else [folder / name for name in find_weight_files(folder).names]

    @torch.inference_mode()
    def open(self) -> None:
        model = fastest_model(self._config, self._tensors())
        if self._kind == DYNAMIC_INT8:
            model = _quantized(model)
        self._model = model
        self._caches = model.caches(self._batch, self._capacity)
        self._step = _stepper(model, self._capacity, lambda: self._caches, compiled=self._kind == COMPILE)
        self._state = model.start(self._batch)
        self._token = torch.zeros(self._batch, 1, dtype=torch.int64)

    @torch.inference_mode()
    def first_token(self) -> None:
        self._step(self._token, self._state, 0)

    def info(self) -> CandidateInfo:
        sizes = [path.stat().st_size for path in self._weight_files()]
        random = "PyTorch ran with random weights, as the bundle holds no checkpoint: a step costs the same with any"
        return CandidateInfo(
            weight_file=sum(sizes) or None,
            weights=_weights_read(self._model, self._batch),
            notes=() if sizes else (random,),
        )

    @torch.inference_mode()
    def steps(self, position: int, warmups: int, count: int) -> StepTimes:
        start = block_start(position, warmups)
        if self._kind == COMPILE:
            self._compile(start, position + count)
        self._go_to(start)
        if position - start < warmups:
            self._timed(start, warmups)
            self._go_to(start)
        self._timed(start, position - start)
        return StepTimes(seconds=self._timed(position, count))

    @torch.inference_mode()
    def prefill(self, tokens: int, passes: Passes) -> float:
        if self._kind == COMPILE:
            raise UnsupportedError("only the step is compiled: every length of a prompt would be compiled anew")
        if passes == "adaptive" or (passes is not None and passes != "exact" and not self._config.carried.iterated):
            raise UnsupportedError(f"PyTorch runs no prefill with passes={passes!r} for this model")
        prompt = self._prompt(tokens)
        begin = time.perf_counter()
        if passes == "exact":
            self._feed(prompt)
        else:
            count = passes if isinstance(passes, int) else self._config.carried.passes
            self._model.prefill(prompt, self._caches, count)
        return time.perf_counter() - begin

    @torch.inference_mode()
    def open_second_session(self) -> None:
        kept, self._caches = self._caches, self._model.caches(self._batch, self._capacity)
        self._step(self._token, self._model.start(self._batch), 0)
        self._second, self._caches = self._caches, kept

    def close_second_session(self) -> None:
        del self._second

    def close(self) -> None:
        """Nothing beyond the process has to be released."""

    def _tensors(self) -> dict[str, Tensor]:
        if self._reference is not None:
            return dict(load_checkpoint(self._reference).tensors)
        return random_tensors(self._config, _SEED)

    def _prompt(self, tokens: int) -> Tensor:
        model, batch = self._config, self._batch
        rows = prompt_rows(self._text, model.vocab_size, batch=batch, tokens=tokens, bos=model.bos_token_id)
        return torch.from_numpy(rows)

    def _feed(self, prompt: Tensor) -> None:
        state = self._model.start(self._batch)
        for position in range(prompt.shape[1]):
            _, self._token, state = self._step(prompt[:, position : position + 1], state, position)
        self._state = state

    def _go_to(self, position: int) -> None:
        """Hold this many tokens, the same ones every time."""
        if position == 0:
            self._state = self._model.start(self._batch)
            self._token = torch.zeros(self._batch, 1, dtype=torch.int64)
            return
        if position not in self._prefixes:
            passes = self._config.carried.passes
            _, token, state = self._model.prefill(self._prompt(position), self._caches, passes)
            held = tuple(cache[:, :, :, :position].clone() for cache in self._caches)
            self._prefixes[position] = (token, state, held)
        self._token, self._state, held = self._prefixes[position]
        for cache, values in zip(self._caches, held, strict=True):
            cache[:, :, :, :position] = values

    def _compile(self, start: int, end: int) -> None:
        """Compile every graph that positions from ``start`` to before ``end`` take, so that no timed step does."""
        for bucket in range(start // BUCKET, (end - 1) // BUCKET + 1):
            if bucket not in self._compiled:
                self._step(self._token, self._model.start(self._batch), max(start, bucket * BUCKET))
                self._compiled.add(bucket)

    def _timed(self, position: int, count: int) -> list[float]:
        seconds, now = [], time.perf_counter
        for number in range(count):
            begin = now()
            _, self._token, self._state = self._step(self._token, self._state, position + number)
            seconds.append(now() - begin)
        return seconds


def fastest_model(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Model:
    """The model as fast as there is one in PyTorch, from the tensors of a checkpoint."""
    return (model_from_tensors if is_classic(config) else GenericModel)(config, tensors)


def _stepper(model: Model, capacity: int, caches: Callable[[], tuple[Tensor, ...]], *, compiled: bool) -> Stepper:
    if not compiled:
        return lambda ids, state, position: model.step(ids, state, caches(), position)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, capacity // BUCKET + 2)
    step = torch.compile(model.step_padded, fullgraph=True, dynamic=False)

    def run(ids: Tensor, state: Carry, position: int) -> tuple[Tensor, Tensor, Carry]:
        end = min(capacity, (position // BUCKET + 1) * BUCKET)
        return step(ids, state, caches(), torch.tensor([position]), end)

    return run


def _quantized(model: Model) -> Model:
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao moves to torchao, and still is what torch has
        warnings.filterwarnings("ignore", "torch.quantize_per", UserWarning)  # likewise
        return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _weights_read(model: nn.Module, batch: int) -> int:
    """Bytes of weights that a step reads: every linear and norm, of the embedding one row per token."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            total += batch * module.weight[0].nbytes
        elif isinstance(module, QuantizedLinear):
            weight, bias = module.weight(), module.bias()
            total += weight.numel() + (0 if bias is None else bias.nbytes)
        else:
            total += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    return total
