"""What the benchmark scripts conclude from figures; the measuring itself is tested where it lives."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.bench.report import StepBytes
from crt_export.config import ModelConfig

# The folder of the scripts is no package, so it goes on the path.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
targets: Any = importlib.import_module("performance_targets")
comparison: Any = importlib.import_module("like_for_like")
pairs: Any = importlib.import_module("paired_steps")
launches: Any = importlib.import_module("launches")
presets: Any = importlib.import_module("preset_bundles")

MEMORY = {
    "weight_file": 100, "pss_before": 50, "anonymous_before": 20, "pss_step": 170, "anonymous_step": 200, "pss": 190,
    "anonymous": 170, "second_session": 4096,
}  # fmt: skip


def document(over_floor: float = 1.2, prefill: dict[tuple[int, str], float] | None = None) -> dict[str, Any]:
    """As much of a benchmark as is judged."""
    step = {"over_floor": over_floor, "over_floor_paired": 1.1, "p50_ms": 4.5, "runtime_overhead": 0.03}
    load = {"first_token_s": 1.1, "cached_share": 1.0}
    prompts = [
        {"tokens": tokens, "method": method, "passes": 4 if method == "passes" else None, "p50_s": seconds}
        for (tokens, method), seconds in (prefill or {}).items()
    ]
    both = [
        {"name": name, "step": [step], "load": load, "memory": MEMORY, "prefill": prompts, "reason": ""}
        for name in (targets.INT8, targets.FP32)
    ]
    absent = {"name": "pytorch-dynamic-int8", "reason": "no such engine\nmore"}
    ratio = {"against": "pytorch-eager", "what": "step", "ratio": 4.0, "low": 3.9, "high": 4.2}
    rates = {"read_gb_s": {"p50": 29.0, "p90": 31.5}}
    return {"candidates": [*both, absent], "ratios": [ratio], "bandwidth": rates}


def test_every_target_of_a_run_gets_its_verdict(tiny_config: Callable[..., ModelConfig]) -> None:
    found = document(1.3)
    lines = [*targets.step_lines("tiny", found, tiny_config().carried, 16), *targets.pytorch_lines("tiny", found)]
    verdicts = {line.figure: (line.value, line.verdict) for line in lines}
    assert verdicts["ort-cpu-fp32: step / bandwidth floor"] == (1.3, "falls short")
    assert verdicts["ort-cpu-int8: step / bandwidth floor"] == (1.3, "holds")
    assert "read rate p50 29.0, p90 31.5 GB/s; 1.10 of the floor at p50" in lines[0].reason
    assert verdicts["ort-cpu-int8: times faster than pytorch-eager"] == (4.0, "falls short")
    assert verdicts["ort-cpu-int8: times faster than pytorch-dynamic-int8"] == (None, "not judged")
    assert verdicts["ort-cpu-int8: open to first token, s"] == (1.1, "holds")
    assert verdicts["ort-cpu-fp32: pss / weight file, steps alone"] == (1.2, "holds")
    assert verdicts["ort-cpu-fp32: anonymous / weight file, steps alone"] == (1.8, "falls short")
    assert verdicts["ort-cpu-fp32: anonymous / weight file, with prefill"] == (1.5, "holds")
    assert verdicts["ort-cpu-fp32: second session / its caches"] == (0.5, "holds")  # 2 x 2 layers x 32 x 16 x 4 bytes
    assert "no such engine" in next(line.text() for line in lines if line.value is None)
    assert "at least 5 " in next(line.text() for line in lines if "eager" in line.figure)


def test_a_default_that_is_slower_than_token_by_token_falls_short() -> None:
    found = document(prefill={(64, "default"): 2.4, (64, "exact"): 2.0, (64, "passes"): 1.0})
    lines = {line.figure: line for line in targets.prefill_lines("tiny", targets.FP32, found)}
    assert lines["ort-cpu-fp32: 64 tokens, default / token by token"].verdict == "falls short"
    assert lines["ort-cpu-fp32: 64 tokens, break-even K"].value == 8.0
    assert lines["ort-cpu-fp32: 64 tokens, passes, K = 4, s"].verdict == "reported"


def test_a_trained_model_is_judged_where_there_is_one() -> None:
    assert targets.trained_line(None, 64).verdict == "not judged"
    found = document(prefill={(64, "default"): 0.5, (64, "exact"): 1.1})
    found["bundle"] = {"targets": {targets.FP32: {"prefill": {"method": "adaptive", "perplexity_gap": 0.004}}}}
    assert targets.trained_line(found, 64).verdict == "holds"


def test_the_languages_are_compared_by_the_median_of_their_rounds() -> None:
    record = {"targets": [{"target": targets.INT8, "cpp_over_python": {"p25": 0.9, "p50": 1.1, "p75": 1.2}}]}
    assert targets.language_line("tiny", targets.INT8, record).verdict == "falls short"
    assert targets.language_line("tiny", targets.INT8, None, "not built").verdict == "not judged"


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(1.7, 1.8, "holds"), (1.2, 1.3, "shrinks"), (0.9, 1.1, "vanishes"), (0.7, 0.9, "reverses")],
)
def test_the_interval_says_what_becomes_of_the_advantage(low: float, high: float, words: str) -> None:
    assert comparison.advantage(low, high, 1.74) == words


def entry() -> dict[str, Any]:
    cost = StepBytes(weights=8_000_000, cache=1_500_000, states=0, logits=500_000, total=10_000_000)
    less = StepBytes(weights=4_000_000, cache=500_000, states=0, logits=500_000, total=5_000_000)
    steps = pairs.PairedSteps(
        position=128, first=[[0.002, 0.002]] * 3, second=[[0.003, 0.003]] * 3, read_gb_s=[10.0] * 3, bytes=(cost, less)
    )
    cell = {"crt_model": "a", "transformer_model": "b", "backend": "eager", "status": "measured", "reason": ""}
    return {**cell, **comparison.entry_of(steps, 1.74, (100, 220))}


def test_a_pair_becomes_a_row_with_its_reasons() -> None:
    found = entry()
    assert (found["ratio"], found["advantage"]) == (1.5, "shrinks")
    assert (found["crt"]["floor_ms"], found["crt"]["over_floor"]) == (1.0, 2.0)
    missing = {**{key: found[key] for key in ("crt_model", "transformer_model", "backend", "published_ratio")}}
    table = comparison.table_of([found, {**missing, "status": "not run", "reason": "no compiler\nmore"}])
    head, rule, row, absent = table.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == absent.count("|")
    assert "| **1.50** [1.50, 1.50] | 1.74 | shrinks | 10.0 / 5.0 | 1.5 / 0.5 | 100 / 220 |" in row
    assert "not run: no compiler |" in absent
    (sentence,) = comparison.reasons_of([found, {"status": "not run"}])
    assert "shrinks at 1.50; by bytes alone it would be 0.50, by launches alone 2.20" in sentence


def test_layers_launch_operators_and_sizes_do_not(tiny_config: Callable[..., ModelConfig]) -> None:
    counts = [
        launches.operators_of_pytorch(tiny_config(**changes))
        for changes in ({}, {"hidden_size": 64}, {"num_hidden_layers": 4}, {"model_type": "transformer"})
    ]
    assert counts[0] == counts[1] < counts[2]
    assert counts[3] < counts[0]


def test_what_is_in_the_folder_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_options: calls.append(command))
    checkpoint = tmp_path / "tiny" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").touch()
    place = presets.preset_folder(tmp_path, "tiny")
    assert [command[3] for command in calls] == ["build"]
    place.bundle.mkdir()
    (place.bundle / "manifest.json").touch()
    assert presets.preset_folder(tmp_path, "tiny") == place
    assert len(calls) == 1
