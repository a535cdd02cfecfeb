"""L0 and L1 pass sound exports of models that are no demo: every precision and both runtimes' forms of the graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loose_runner import loose_runner
from short_setup import short_setup

from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity import ParityCase, ParityOptions
from crt_export.parity.contract import check_contract_level
from crt_export.parity.one_step import check_one_step
from crt_export.parity.runner import disabled_optimizers
from crt_export.parity.setup import ParitySetup
from crt_export.profile import EngineProfile, load_profile
from crt_export.progress import no_progress
from crt_export.quantize.calibration import calibrate, calibration_windows
from crt_export.quantize.plan import W8A8Plan, plan_w8a8
from crt_export.stages.graphs import variants_of_profile, write_graphs
from crt_export.text import TokenText

TARGETS = ("ort-cpu-fp32", "ort-cpu-int8", "ort-cuda-fp16", "rtx-sm80-fp16", "rtx-sm80-int8")
LENGTH = 32


def _no_bias(tensors: dict[str, Any]) -> None:
    """Biases of an untrained model: they tell nothing of what smoothing folded into v."""
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor.zero_()


@pytest.mark.evidence
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"hidden_size": 140, "num_attention_heads": 2, "vocab_size": 300, "tokenizer": "none", "unroll_steps": 2,
             "rope_layout": "half", "edit": _no_bias},
            id="2 heads of 70, half layout, no biases",
        ),
        pytest.param(
            {"max_position_embeddings": 48, "training_sequence_length": None, "sliding_window": 8, "unroll_steps": 3,
             "tie_word_embeddings": True},
            id="48 positions, window, tied head",
        ),
        pytest.param(
            {"model_type": "transformer", "sliding_window": 4, "rope_layout": "half", "num_hidden_layers": 3},
            id="plain transformer of three layers",
        ),
    ],
)  # fmt: skip
def test_sound_exports_pass(
    make_checkpoint: Callable[..., Path], real_text: TokenText, tmp_path: Path, changes: dict[str, Any]
) -> None:
    checkpoint = load_checkpoint(make_checkpoint(**changes))
    setup = _setup(checkpoint, real_text)
    for case in _cases(checkpoint, real_text, tmp_path):
        for check in (check_contract_level, check_one_step):
            result = check(case, setup)
            assert result.passed, (case.target, result.failures)


def _setup(checkpoint: Checkpoint, text: TokenText) -> ParitySetup:
    options = ParityOptions(validation_tokens=8 * LENGTH, window=LENGTH, short_reason="a test of levels", threads=1)
    return short_setup(checkpoint, text, options)


def _cases(checkpoint: Checkpoint, text: TokenText, folder: Path) -> list[ParityCase]:
    """The graphs of every target as a build writes them, without compiling engines."""
    config = checkpoint.config
    unroll = config.carried.passes
    capacity = config.max_position_embeddings
    profiles = [load_profile(name).with_capacity(capacity).with_unroll(unroll) for name in TARGETS]
    # Decomposed attention and an FP32 residual stream: the other form of each choice.
    profiles = [dataclasses.replace(p, attention="decomposed") if p.compiled else p for p in profiles]
    profiles.append(dataclasses.replace(profiles[-1], name="other-forms", residual_dtype="float32"))
    plan = _plan(checkpoint, text, unroll)
    written = write_graphs(checkpoint, profiles, plan, folder, no_progress)
    return [_case(profile, written, checkpoint, folder, plan) for profile in profiles]


def _plan(checkpoint: Checkpoint, text: TokenText, unroll: int) -> W8A8Plan:
    model = model_from_checkpoint(checkpoint)
    windows = calibration_windows(text.ids[-40_000:], seq=LENGTH)
    return plan_w8a8(model, calibrate(model, windows, unroll=unroll))


def _case(
    profile: EngineProfile, written: Any, checkpoint: Checkpoint, folder: Path, plan: W8A8Plan | None
) -> ParityCase:
    files = {name: written[variant] for name, variant in variants_of_profile(profile, checkpoint.config).items()}
    graphs = {name: folder / file.file for name, file in files.items()}
    unroll, capacity = profile.unroll or 1, profile.capacity if profile.compiled else None
    return ParityCase(
        target=profile.name,
        runtime=profile.runtime,
        precision=profile.precision,
        graphs=graphs,
        opener=lambda _: loose_runner(graphs, checkpoint.config, profile.precision, unroll=unroll, capacity=capacity),
        unroll=unroll,
        cache_dtype=profile.cache_dtype,
        capacity=capacity,
        residual_dtype=profile.residual_dtype,
        disabled_optimizers=disabled_optimizers(profile),
        plan=plan if profile.precision == "w8a8" else None,
    )
