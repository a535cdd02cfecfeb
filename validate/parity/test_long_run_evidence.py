"""The long run of the demo at its full length: 20,480 tokens in one cache of that size, and in chained windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crt_export.parity import ParityOptions, ParityReport, validate_bundle
from crt_export.parity.levels import LONG_RUN
from crt_export.parity.report import LevelResult
from crt_export.pipeline import BuildOptions, build

pytestmark = [pytest.mark.evidence, pytest.mark.timeout(1800)]

TOKENS = 20_480
TARGETS = ("ort-cpu-fp32", "ort-cpu-int8", "rtx-sm80-fp16", "rtx-sm80-int8")
HALF = ("rtx-sm80-fp16", "rtx-sm80-int8")


@pytest.fixture(scope="module")
def report(demo_checkpoint: Path, heldout_text: Path, tmp_path_factory: pytest.TempPathFactory) -> ParityReport:
    """The demo with room for the whole run in every target, at this level alone."""
    bundle = tmp_path_factory.mktemp("long") / "demo"
    build(
        BuildOptions(
            checkpoint=demo_checkpoint, output=bundle, targets=TARGETS, text=heldout_text, capacity=TOKENS,
            validated=False,
        )
    )  # fmt: skip
    options = ParityOptions(levels=(LONG_RUN,), long_run_tokens=TOKENS, threads=1)
    return validate_bundle(bundle, text=heldout_text, options=options)


def _level(report: ParityReport, target: str) -> LevelResult:
    return next(level for level in report.levels if level.target == target)


def _run(report: ParityReport, target: str, kind: str) -> dict[str, Any]:
    return next(run for run in _level(report, target).data["runs"] if run["kind"] == kind)


def test_every_target_holds_every_gate(report: ParityReport) -> None:
    assert report.passed, report.failures
    assert [level.target for level in report.levels if level.passed is not None] == [*TARGETS]


@pytest.mark.parametrize("target", TARGETS)
def test_both_runs_have_all_tokens_and_nothing_that_is_not_finite(report: ParityReport, target: str) -> None:
    for kind, capacity in (("single", TOKENS), ("chained", TOKENS if target in HALF else 128)):
        run = _run(report, target, kind)
        assert (run["tokens"], run["capacity"], run["non_finite"]) == (TOKENS, capacity, 0)
        assert run["blocks"][-1]["stop"] == TOKENS
    assert all(block["gated"] for block in _run(report, target, "chained")["blocks"])
    assert [block["gated"] for block in _run(report, target, "single")["blocks"]] == [True] * 4 + [False] * 21


@pytest.mark.parametrize("target", TARGETS)
def test_below_the_training_length_the_error_does_not_grow(report: ParityReport, target: str) -> None:
    """The gate judged all of the run, and its interval is narrow enough to tell growth of a quarter from none."""
    growth = _run(report, target, "chained")["growth"]
    assert growth["gated"]
    assert growth["units"] == TOKENS // 128
    low, high = growth["over_run_ci"]
    assert low < growth["over_run"] < high <= growth["over_run_limit"]
    assert high - low < 0.25
    assert growth["over_run"] == pytest.approx(growth["per_1000_tokens"] * TOKENS / 1000 / growth["mean_error"])


@pytest.mark.parametrize("target", HALF)
def test_every_layer_has_fp16_headroom_over_the_whole_run(report: ParityReport, target: str) -> None:
    for kind in ("single", "chained"):
        layers = _run(report, target, kind)["headroom_by_layer"]
        assert {"state", "embed", "correction", "layers.0", "final_norm"} <= set(layers)
        assert 0 < max(layers.values()) < 100
