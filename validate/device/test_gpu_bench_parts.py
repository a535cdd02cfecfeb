"""The GPU benchmark's parts, all but the capture of a CUDA graph, on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_bench
import gpu_candidates
import pytest
import torch
from bound_step import BoundStep, write_step
from gpu_rounds import copy_rate, figures_of_pair, run_in_rounds, step_figures, waiting_for
from static_step import StaticStep, random_model, step_cost

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.models.base import LanguageModel
from crt_export.models.presets import random_tensors
from crt_export.models.registry import model_from_checkpoint

TOKENS = 9


def reference(config: ModelConfig) -> LanguageModel:
    """The reference model with the weights of random_model()."""
    tensors = random_tensors(config, 0)
    checkpoint = Checkpoint(path=Path("none"), config=config, tensors=tensors, stored_dtypes=("F32",), sha256="")
    return model_from_checkpoint(checkpoint)


def decoded(model: LanguageModel, first: int) -> tuple[list[int], list[torch.Tensor]]:
    """Tokens and logits of a greedy run of the reference."""
    state, token, tokens, logits = model.start(1), first, [], []
    for _ in range(TOKENS):
        hidden, state = model.step(torch.tensor([[token]]), state)
        logits.append(model.head(hidden)[0, 0])
        token = int(logits[-1].argmax())
        tokens.append(token)
    return tokens, logits


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 40}, {"rope_layout": "half", "tie_word_embeddings": True}, {"model_type": "transformer"}],
)
def test_a_static_step_decodes_as_the_reference_does(
    tiny_config: Callable[..., ModelConfig], masked: bool, changes: dict[str, object]
) -> None:
    """Greedily, every row, with heads of 10 that the caches pad to 16."""
    config = tiny_config(**changes)
    tokens, logits = decoded(reference(config), 65)
    step = StaticStep(random_model(config, dtype=torch.float32, device="cpu"), batch=3, context=TOKENS, masked=masked)
    step.ids.fill_(65)
    for position, (token, expected) in enumerate(zip(tokens, logits, strict=True)):
        step.seek(position)
        step()
        assert step.ids.flatten().tolist() == [token] * 3
        torch.testing.assert_close(step.logits, expected.expand(3, -1), atol=2e-5, rtol=1e-4)


def test_a_position_outside_the_caches_is_refused(tiny_config: Callable[..., ModelConfig]) -> None:
    step = StaticStep(random_model(tiny_config(), dtype=torch.float32, device="cpu"), batch=1, context=4, masked=True)
    with pytest.raises(ValueError, match="from 0 to 3, found 4"):
        step.seek(4)


def check_bound(path: Path, model: LanguageModel) -> None:
    """A batch of two on a CPU, fed by hand, against the reference."""
    tokens, logits = decoded(model, 65)
    step = BoundStep(path, device="cpu", batch=2, context=TOKENS, captured=False)
    for position, (token, expected) in enumerate(zip([65, *tokens], logits, strict=False)):
        step.seek(position)
        step.feed([token, token])
        step()
        step.take_state()
        found = torch.from_numpy(step.values["logits"].numpy())
        torch.testing.assert_close(found, expected.expand(2, -1), atol=2e-5, rtol=1e-4)


def test_the_bound_graph_decodes_as_the_reference_does(tiny_bundle: Callable[..., tuple[Path, LanguageModel]]) -> None:
    folder, model = tiny_bundle("crt", num_hidden_layers=1, unroll_steps=3)
    check_bound(folder / "graphs" / "step.fp32.onnx", model)


@pytest.mark.evidence
def test_the_graph_that_is_exported_has_the_random_weights(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    check_bound(write_step(config, tmp_path, dtype=torch.float32), reference(config))


@pytest.mark.parametrize("tied", [False, True])
def test_the_cost_of_a_step_is_what_its_tensors_hold(tiny_config: Callable[..., ModelConfig], tied: bool) -> None:
    config: Any = tiny_config(tie_word_embeddings=tied)
    model: Any = reference(config)
    cost = step_cost(config, batch=2, position=5, bytes_per_number=4)
    embedding = model.embed.weight.nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters()) - embedding
    assert cost.weights == weights + 2 * config.hidden_size * 4
    assert cost.cache == 2 * config.num_hidden_layers * config.hidden_size * 6 * 4 * 2
    assert cost.total == cost.weights + cost.cache + 2 * config.vocab_size * 4


def test_rounds_alternate_and_only_steps_after_the_warm_up_are_timed() -> None:
    calls: list[str] = []
    rounds = run_in_rounds(
        lambda: calls.append("a"), lambda: calls.append("b"), rounds=2, steps=2, warmups=1, wait=waiting_for("cpu")
    )
    assert calls == [*"aaa", *"bbb", *"bbb", *"aaa"]
    assert [(len(first), len(second)) for first, second in rounds] == [(2, 2), (2, 2)]


def test_the_ratio_says_how_many_times_longer_the_transformer_takes() -> None:
    figures = figures_of_pair([([0.001, 0.001], [0.002, 0.002]), ([0.003], [0.006])], batch=4)
    assert (figures["ratio"], figures["low"], figures["high"], figures["rounds"]) == (2.0, 2.0, 2.0, 2)
    assert step_figures([0.002, 0.002], 4)["tokens_per_s"] == 2000


def test_a_copy_has_a_rate() -> None:
    assert copy_rate("cpu", 1 << 20, samples=3) > 0


def test_every_cell_of_the_grid_is_measured_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fail(Exception):
        """As ONNX Runtime's own errors, which are no RuntimeError."""

    def refusing(*_words: object, **_more: object) -> None:
        raise Fail("no such provider\nand more words")

    monkeypatch.setattr(gpu_candidates, "BoundStep", refusing)
    monkeypatch.setattr(gpu_candidates, "write_step", lambda *_words, **_more: tmp_path)
    words = "--device cpu --pair tiny:tiny --dtype fp32 --dtype bf16 --batch 2 --context 8 --context 5000 --rounds 2"
    output = tmp_path / "gpu.json"
    assert gpu_bench.main([*words.split(), "--steps", "2", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    cells = {(e["backend"], e["dtype"], e["context"]): e["reason"] for e in result["entries"]}
    positions = "the models have positions for 4096 tokens"
    for dtype, onnx in (("fp32", "Fail: no such provider"), ("bf16", "the exported graph runs in fp32 here")):
        assert cells[gpu_candidates.EAGER, dtype, 8] == ""
        assert cells[gpu_candidates.CUDA_GRAPH, dtype, 8] == "a CUDA graph needs an NVIDIA GPU"
        assert cells[gpu_candidates.ONNXRUNTIME, dtype, 8] == onnx
        assert {cells[backend, dtype, 5000] for backend in gpu_bench.BACKENDS} == {positions}
    measured = [entry for entry in result["entries"] if entry["status"] == "measured"]
    assert [entry["dtype"] for entry in measured] == ["fp32", "bf16"]
    fp32, bf16 = (entry["crt"] for entry in measured)
    assert fp32["bytes"]["total"] == 2 * bf16["bytes"]["total"]
    assert fp32["floor_ms"] > 0
    assert "torch" in result["versions"]
    assert result["hardware"]["cores"] >= 1
    assert "not run: a CUDA graph needs" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_written_and_the_reason_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_bench.main(["--output", str(tmp_path / "gpu.json")]) == 3
    assert "sees no NVIDIA GPU" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def test_the_published_pairs_are_the_default() -> None:
    grid = gpu_candidates.Grid()
    assert [pair[2] for pair in grid.pairs] == [1.74, 2.6]
    assert (grid.batches, grid.contexts, grid.dtypes) == ((1, 8, 64), (128, 1024, 4096), ("bf16", "fp16"))
