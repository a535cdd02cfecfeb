"""A benchmark of the golden bundle, as ``crt-export bench --output`` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.bench.report import BenchReport, Candidate, ModelSize, StepFigures
from crt_export.bundle import open_bundle

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "bundle-v1"


def _step(ms: float) -> StepFigures:
    times = dict.fromkeys(("p10_ms", "p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms"), ms)
    return StepFigures(position=64, batch=1, samples=20, tokens_per_s=1e3 / ms, **times)


@pytest.fixture
def make_bench() -> Callable[..., Path]:
    """``make_bench(path, identity=..., targets={name: ms})``: write a benchmark, of the golden bundle by default."""

    def make(path: Path, **changes: Any) -> Path:
        times = changes.get("targets", {"ort-cpu-int8": 0.3125, "ort-cpu-fp32": 12.345})
        targets = [
            Candidate(name=name, kind="target", status="measured", step=(_step(ms),)) for name, ms in times.items()
        ]
        eager = Candidate(name="pytorch-eager", kind="pytorch-eager", status="measured", step=(_step(99.0),))
        size = ModelSize(
            name="bundle-v1",
            model_type="transformer",
            hidden_size=16,
            caches=1,
            vocab_size=256,
            parameters=9,
        )
        report = BenchReport(
            created="2026-11-30T18:00:00+00:00",
            command="crt-export bench bundle-v1",
            crt_export="0.1.0",
            hardware={"processor": "two cores of something", "cores": 2},
            versions={},
            bundle={"name": "bundle-v1", "sha256": changes.get("identity", open_bundle(GOLDEN).identity)},
            model=size,
            options={},
            bandwidth=None,
            compute=None,
            candidates=(*targets, eager),
        )
        path.write_text(json.dumps(report.to_dict()), encoding="utf-8")
        return path

    return make
