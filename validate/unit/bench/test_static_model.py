"""The PyTorch baseline computes the model that it is compared as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crt_export.bench.generic_model import GenericModel
from crt_export.bench.pytorch_runner import BUCKET, COMPILE, DYNAMIC_INT8, EAGER, Model, PyTorchRunner, fastest_model
from crt_export.bench.static_model import StaticModel, is_classic
from crt_export.checkpoint import load_checkpoint
from crt_export.config import ModelConfig
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint

BATCH, TOKENS, CAPACITY = 2, 12, 20


CLASSIC: dict[str, dict[str, Any]] = {
    "crt": {},
    "half": {"rope_layout": "half"},
    "tied": {"tie_word_embeddings": True},
    "window": {"sliding_window": 5},
    "transformer": {"model_type": "transformer"},
}
#: What other decoders have, with windows and rotations that differ by layer; with the correction and without.
OTHERS: dict[str, Any] = {
    "norm": "rms", "norm_placement": "sandwich", "gated_mlp": True, "activation": "silu", "biases": False,
    "qk_norm": "head", "num_key_value_heads": 2, "head_dim": 16, "layer_attention": [[5, 0], [None, None]],
    "logit_softcap": 30.0,
}  # fmt: skip
GENERIC: dict[str, dict[str, Any]] = {
    "grouped": {"num_key_value_heads": 2},
    "others-crt": OTHERS,
    "others": {"model_type": "transformer", "learned_positions": True, "parallel_residual": True, **OTHERS},
}


@pytest.fixture(scope="module", params=[*CLASSIC, *GENERIC])
def models(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> tuple[Model, LanguageModel]:
    checkpoint = load_checkpoint(make_checkpoint(**{**CLASSIC, **GENERIC}[request.param]))
    fast = fastest_model(checkpoint.config, dict(checkpoint.tensors))
    assert isinstance(fast, StaticModel if request.param in CLASSIC else GenericModel)
    return fast, model_from_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "rms"}, {"norm_placement": "post"}, {"parallel_residual": True}, {"activation": "relu"},
        {"gated_mlp": True}, {"biases": False}, {"qk_norm": "full"}, {"learned_positions": True},
        {"logit_softcap": 9.0}, {"num_key_value_heads": 2}, {"head_dim": 16}, {"layer_attention": [[4, 0], [None, 0]]},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_with_any_other_option_is_not_taken_for_a_classic_one(
    tiny_config: Callable[..., ModelConfig], changes: dict[str, Any]
) -> None:
    assert not is_classic(tiny_config(**changes))
    assert is_classic(tiny_config(layer_attention=[[4, 0]]))


@torch.inference_mode()
def test_steps_give_the_logits_of_the_reference_at_every_position(models: tuple[Any, LanguageModel]) -> None:
    fast, reference = models
    ids = torch.randint(256, (BATCH, TOKENS), generator=torch.Generator().manual_seed(3))
    expected = reference.head(reference.sequential(ids)[0].hidden)
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
    models: tuple[Any, LanguageModel],
) -> None:
    fast, reference = models
    passes = 3 if fast.config.carried.iterated else 1
    ids = torch.randint(256, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(4))
    prompt, last = ids[:, :-1], ids[:, -1:]
    expected, after, _ = reference.unroll(prompt, passes)
    caches = fast.caches(BATCH, CAPACITY)
    logits, _, state = fast.prefill(prompt, caches, passes)
    torch.testing.assert_close(logits, reference.head(expected.hidden)[:, -1], atol=1e-4, rtol=1e-4)
    logits, _, _ = fast.step(last, state, caches, TOKENS)
    torch.testing.assert_close(logits, reference.head(reference.step(last, after)[0])[:, -1], atol=1e-4, rtol=1e-4)


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


def test_linears_of_any_model_are_quantised(tiny_config: Callable[..., ModelConfig]) -> None:
    """Every one: a step then reads less than a third of what it read."""
    config = tiny_config(**OTHERS)
    sizes = []
    for kind in (EAGER, DYNAMIC_INT8):
        runner = PyTorchRunner(kind, config, None, batch=1, capacity=20, threads=torch.get_num_threads())
        runner.open()
        assert len(runner.steps(3, 1, 2).seconds) == 2
        assert runner.prefill(4, None) > 0
        sizes.append(runner.info().weights or 0)
    assert sizes[1] < sizes[0] / 3
