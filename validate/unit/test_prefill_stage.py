"""How a build chooses the way each target takes prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.errors import UnsupportedError
from crt_export.parity.certificate.curves import Stopping
from crt_export.parity.statistics import Interval
from crt_export.profile import EngineProfile, load_profile
from crt_export.runtime.prefill import PrefillPlan
from crt_export.stages.prefill import PassLimits, _plan, pass_limits, prefill_plans
from crt_export.text import TokenText

UNROLL = 3
STOPPING = Stopping(
    bound=0.2, gap=Interval(mean=0.001, low=-0.008, high=0.006), passes=5.2, most_passes=7, unreached=0.0
)
LIMITS = PassLimits(chunk=256, passes=6, stopping=STOPPING)
Make = Callable[..., Path]


def profile(name: str, **changes: str) -> EngineProfile:
    return replace(load_profile(name).with_unroll(UNROLL), **changes)


@pytest.fixture(scope="module")
def recurrent(make_checkpoint: Make) -> Checkpoint:
    """A recurrent model of one layer with random weights."""
    return load_checkpoint(make_checkpoint(num_hidden_layers=1, unroll_steps=UNROLL))


def test_a_model_that_predicts_nothing_has_no_bound(recurrent: Checkpoint) -> None:
    ids = np.random.default_rng(0).integers(0, recurrent.config.vocab_size, 4096)
    assert pass_limits(recurrent, TokenText(ids=ids, source="random"), 32) is None


def test_without_a_bound_int8_steps_and_fp32_makes_the_passes_it_was_built_for(recurrent: Checkpoint) -> None:
    plans = prefill_plans(recurrent, [profile("ort-cpu-fp32"), profile("ort-cpu-int8")], None)
    assert plans["ort-cpu-fp32"] == PrefillPlan(method="passes", passes=UNROLL, shortest=UNROLL + 1)
    assert plans["ort-cpu-int8"].method == "steps"


def test_with_a_bound_fp32_stops_by_its_residual(recurrent: Checkpoint) -> None:
    plan = _plan(profile("ort-cpu-fp32"), recurrent.config, LIMITS)
    assert (plan.method, plan.chunk, plan.residual_bound, plan.perplexity_gap) == ("adaptive", 256, 0.2, 0.008)
    assert (plan.passes, plan.shortest) == (7, 12)
    steps = _plan(profile("ort-cpu-int8"), recurrent.config, LIMITS)
    assert (steps.method, steps.residual_bound) == ("steps", 0.2)
    compiled = _plan(profile("rtx-sm80-fp16"), recurrent.config, LIMITS)
    assert (compiled.method, compiled.passes, compiled.residual_bound) == ("passes", UNROLL, None)


@pytest.mark.parametrize("method", ["steps", "passes", "adaptive"])
def test_a_profile_may_insist(recurrent: Checkpoint, method: str) -> None:
    for name in ("ort-cpu-fp32", "ort-cpu-int8"):
        assert _plan(profile(name, prefill=method), recurrent.config, LIMITS).method == method


def test_adaptive_without_a_bound_is_refused(recurrent: Checkpoint) -> None:
    with pytest.raises(UnsupportedError, match="ort-cpu-fp32: prefill = 'adaptive' needs a bound"):
        prefill_plans(recurrent, [profile("ort-cpu-fp32", prefill="adaptive")], None)
