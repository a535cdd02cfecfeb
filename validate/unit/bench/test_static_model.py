"""The PyTorch baseline computes the model that it is compared as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crt_export.bench.pytorch_runner import BUCKET, COMPILE, PyTorchRunner
from crt_export.bench.static_model import StaticModel, model_from_tensors
from crt_export.checkpoint import load_checkpoint
from crt_export.config import ModelConfig
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint

BATCH, TOKENS, CAPACITY = 2, 12, 20


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"rope_layout": "half"},
        {"tie_word_embeddings": True},
        {"sliding_window": 5},
        {"model_type": "transformer"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain-crt",
)
def models(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> tuple[StaticModel, LanguageModel]:
    changes: dict[str, Any] = request.param
    checkpoint = load_checkpoint(make_checkpoint(**changes))
    return model_from_tensors(checkpoint.config, dict(checkpoint.tensors)), model_from_checkpoint(checkpoint)


@torch.inference_mode()
def test_steps_give_the_logits_of_the_reference_at_every_position(models: tuple[StaticModel, LanguageModel]) -> None:
    fast, reference = models
    ids = torch.randint(256, (BATCH, TOKENS), generator=torch.Generator().manual_seed(3))
    expected = reference.head(reference.sequential(ids)[0])
    exact, padded = fast.caches(BATCH, CAPACITY), fast.caches(BATCH, CAPACITY)
    state = other = fast.start(BATCH)
    for position in range(TOKENS):
        token = ids[:, position : position + 1]
        logits, likeliest, state = fast.step(token, state, exact, position)
        torch.testing.assert_close(logits, expected[:, position], atol=1e-4, rtol=1e-4)
        assert torch.equal(likeliest[:, 0], logits.argmax(-1))
        # Entries beyond the position are masked, whatever they hold.
        logits, _, other = fast.step_padded(token, other, padded, torch.tensor([position]), 16)
        torch.testing.assert_close(logits, expected[:, position], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_prompt_in_passes_gives_what_the_reference_gives_and_steps_go_on_from_it(
    models: tuple[StaticModel, LanguageModel],
) -> None:
    fast, reference = models
    passes = 3 if fast.config.carried.iterated else 1
    ids = torch.randint(256, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(4))
    prompt, last = ids[:, :-1], ids[:, -1:]
    h, carry, _ = reference.unroll(prompt, passes)
    caches = fast.caches(BATCH, CAPACITY)
    logits, _, state = fast.prefill(prompt, caches, passes)
    torch.testing.assert_close(logits, reference.head(h)[:, -1], atol=1e-4, rtol=1e-4)
    logits, _, _ = fast.step(last, state, caches, TOKENS)
    torch.testing.assert_close(logits, reference.head(reference.step(last, carry)[0])[:, -1], atol=1e-4, rtol=1e-4)


def test_no_timed_step_compiles(tiny_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    before_timing: list[list[int]] = []

    def compile_as_it_is(step: Callable[..., Any], **_options: object) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if args[-1] not in compiled:
                compiled.append(args[-1])
            return step(*args)

        return run

    monkeypatch.setattr(torch, "compile", compile_as_it_is)
    config = tiny_config(max_position_embeddings=2 * BUCKET + 8)
    threads = torch.get_num_threads()
    runner = PyTorchRunner(COMPILE, config, None, batch=1, capacity=2 * BUCKET + 8, threads=threads)
    runner.open()
    timed = runner._timed

    def watched(position: int, count: int) -> list[float]:
        before_timing.append(list(compiled))
        return timed(position, count)

    monkeypatch.setattr(runner, "_timed", watched)
    assert len(runner.steps(BUCKET - 2, 3, BUCKET + 5).seconds) == BUCKET + 5
    ends = [BUCKET, 2 * BUCKET, 2 * BUCKET + 8]
    assert (before_timing, compiled) == ([ends, ends], ends)
