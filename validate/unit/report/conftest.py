"""Reports to render, to compare and to damage.

``sample_report`` has every curve of every level, shaped as the levels write them, without running a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.catalog import definition_path
from crt_export.parity import Comparison, ParityReport, load_tolerances
from crt_export.parity.metrics import Check, measured
from crt_export.parity.own_model import not_compared
from crt_export.parity.report import COMPILED, LevelResult, corpus_result

WINDOW, TRAINED, UNROLL = 256, 128, 10
PASSES = list(range(1, 2 * UNROLL + 1))
EDGES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
#: Target, precision, arithmetic, and its error relative to that of the 8-bit weights.
TARGETS = (
    ("ort-cpu-int8", "w8", "int8+fp32", 1.0),
    ("rtx-sm80-fp16", "fp16", "fp32-emulated", 0.05),
    ("ort-cpu-fp32", "fp32", "fp32", 4e-6),
)


def _wave(index: int) -> float:
    """Between -1 and 1, the same for the same index: what stands in for measured noise."""
    return math.sin(12.9898 * index + 78.233)


def _span(start: int, stop: int, scale: float) -> dict[str, Any]:
    sequential = 3.33 if start == 0 else 3.16
    wider = 1.0 if start == 0 else 4.0
    gaps = [wider * 1.2 * math.exp(-1.1 * (k - 1)) + 2e-5 * _wave(k) * (1 + scale) for k in PASSES]
    halves = [0.1 * gap + 2e-4 for gap in map(abs, gaps)]
    perplexities = [sequential * math.exp(gap) for gap in gaps]
    return {
        "start": start,
        "stop": stop,
        "gated": start == 0,
        "sequential_nll": math.log(sequential),
        "sequential_perplexity": sequential,
        "perplexity": perplexities,
        "nll": [math.log(value) for value in perplexities],
        "gap_nll": gaps,
        "gap_nll_ci": [[gap - half, gap + half] for gap, half in zip(gaps, halves, strict=True)],
        "perplexity_gap": [value - sequential for value in perplexities],
        "perplexity_gap_ci": [
            [sequential * math.expm1(gap - half), sequential * math.expm1(gap + half)]
            for gap, half in zip(gaps, halves, strict=True)
        ],
        "kl": [1.5 * abs(gap) + 1e-7 for gap in gaps],
        "kl_ci": [[1.3 * abs(gap), 1.7 * abs(gap) + 2e-7] for gap in gaps],
        "excess": [scale * 1e-4 * _wave(k) for k in PASSES],
        "excess_ci": [[scale * 1e-4 * (_wave(k) - 2), scale * 1e-4 * (_wave(k) + 2)] for k in PASSES],
        "smallest_passes": 6 if start == 0 else None,
    }


def _certificate(scale: float) -> dict[str, Any]:
    shown = [1, 2, 4, 10, 20]
    drift = [[1e-7 + scale * 1e-6 + 0.4 * math.exp(-1.2 * k) * (i / 4) ** 1.5 for i in range(9)] for k in shown]
    spans = [_span(0, TRAINED, scale), _span(TRAINED, WINDOW, scale)]
    return {
        "unroll": UNROLL,
        "trained": TRAINED,
        "window": WINDOW,
        "windows": 16,
        "passes": PASSES,
        "spans": spans,
        "positions": {
            "edges": EDGES,
            "passes": shown,
            "gap_nll": drift,
            "gap_nll_ci": [[[value * 0.7, value * 1.3] for value in row] for row in drift],
            "kl": drift,
            "kl_ci": [[[value * 0.7, value * 1.3] for value in row] for row in drift],
        },
        "residual": [
            {
                "passes": k,
                "residual_median": 8 * math.exp(-k) + 1e-6 * scale,
                "error_median": 5 * math.exp(-1.02 * k) + 1e-6 * scale,
                "error_max": 40 * math.exp(-0.9 * k) + 1e-5 * scale,
                "ratio_median": 0.7,
                "ratio_p95": 2.1,
                "correlation": 0.93,
            }
            for k in PASSES
        ],
        "anchors": [{"tokens": n, "passes": n, "error": 1e-6 * (1 + scale * 1e3), "limit": 1e-4} for n in (4, 20)],
        "handover": {
            "passes": [2, 5, 10],
            "delta_nll": [0.01, 1e-4, -2e-5],
            "delta_nll_ci": [[0.008, 0.012], [-1e-4, 3e-4], [-2e-4, 1.6e-4]],
            "kl": [0.02, 2e-4, 1e-4],
            "max_state_error": [0.3, 0.02, 0.01],
        },
        "reference": {"spans": [_span(0, TRAINED, 0.0), _span(TRAINED, WINDOW, 0.0)]},
    }


def _long_run(scale: float) -> dict[str, Any]:
    def blocks(tokens: int, trained: int | None) -> list[dict[str, Any]]:
        return [
            {
                "start": start,
                "stop": start + 512,
                "nll": 1.2 + 0.02 * _wave(start),
                "reference_nll": 1.2 + 0.02 * _wave(start),
                "relative_error": scale * (0.01 + 2e-8 * start) * (1 + 0.1 * _wave(start)),
                "kl": scale * 2e-4 * (1 + 0.1 * _wave(start)),
                "state_norm": 20 + 3e-4 * start + scale * 0.05 * _wave(start),
                "reference_state_norm": 20 + 3e-4 * start,
                "state_error": scale * 0.02,
                "top1_agreement": 1 - 0.005 * scale,
                "gated": trained is None or start + 512 <= trained,
            }
            for start in range(0, tokens, 512)
        ]

    growth = {"figure": "relative logit error per 1,000 tokens", "per_1000_tokens": scale * 2e-5, "limit": 5e-3}
    return {
        "runs": [
            {
                "kind": kind,
                "tokens": 20480,
                "capacity": capacity,
                "trained": trained,
                "blocks": blocks(20480, trained),
                "growth": {**growth, "ci": [scale * -1e-5, scale * 5e-5], "gated": kind == "chained"},
                "non_finite": 0,
                "headroom": {"next_state": 31.0, "logits": 17.5},
                "headroom_by_layer": {"correction": 31.0, "layers.0": 27.5, "head": 17.5},
            }
            for kind, capacity, trained in (("single", 20480, 1024), ("chained", 1024, None))
        ]
    }


def _statistics(scale: float, shift: float) -> dict[str, Any]:
    value, centre = scale * 2e-4 * shift, math.log10(2e-4 * scale)
    edges = [-16 + 0.5 * index for index in range(33)]
    counts = [round(900 * math.exp(-(((edge + 0.25 - centre) / 1.2) ** 2))) for edge in edges[:-1]]
    return {
        "perplexity_ci": [3.1, 3.4],
        "perplexity_ratio": 1 + value,
        "perplexity_ratio_ci": [1 - value, 1 + 3 * value],
        "log_perplexity_correlation": 0.9999,
        "delta_nll_bootstrap_ci": [-value, 3 * value],
        "kl": {"median": value / 4, "p99": 9 * value},
        "kl_histogram": {"edges": edges, "counts": counts},
        "probability_change": {"mean": -value, "mean_ci": [-2 * value, 0.0], "p50": 0.0},
        "by_position": [
            {
                "start": start,
                "stop": start + 32,
                "delta_nll": value * (1 + 3 * _wave(start)),
                "delta_nll_ci": [value * (3 * _wave(start) - 3), value * (3 * _wave(start) + 5)],
                "kl": value * (1 + start / 512),
                "kl_ci": [value * 0.8, value * (1.2 + start / 256)],
            }
            for start in range(0, WINDOW, 32)
        ],
    }


def _comparison(target: str, precision: str, arithmetic: str, scale: float, regime: str, shift: float) -> Comparison:
    limits = load_tolerances().precisions[precision]

    def gate(metric: str, value: float, ends: tuple[float, float] | None = None) -> Check:
        limit = getattr(limits, metric)
        return measured(metric, f"{regime}: {metric}", value, interval=ends, limit=limit, precision=precision)

    return Comparison(
        target=target,
        runtime="onnxruntime",
        graph="step" if regime == "step" else "prefill+head",
        precision=precision,
        regime=regime,
        label=regime,
        tokens=4096,
        steps=256,
        nll=1.1757 + scale * 2.2e-4,
        reference_nll=1.1757,
        mean_abs_logit_error=scale * 0.02,
        top1_tokens=4050,
        arithmetic=arithmetic,
        better_than_chance=True,
        positions=(0, WINDOW),
        checks=(
            gate("delta_nll", scale * 2.2e-4, (scale * -1.2e-5, scale * 4.5e-4)),
            gate("top1_agreement", 1 - 0.0053 * scale, (1 - 0.0063 * scale, 1 - 0.0043 * scale)),
            gate("relative_logit_error", scale * 0.009, (scale * 0.0088, scale * 0.0092)),
            gate("max_abs_logit_error", scale * 0.37),
            gate("mean_kl", scale * 2e-4 * shift, (scale * 1.8e-4 * shift, scale * 2.2e-4 * shift)),
        ),
        statistics=_statistics(scale, shift),
    )


def _data(level: str, scale: float) -> dict[str, Any]:
    steps = range(1, 65)
    data: dict[str, dict[str, Any]] = {
        "contract": {"graphs": {"step": {"file": "graphs/step.onnx", "bytes": 61234, "opset": {"": 24}}}},
        "one-step": {"positions": [0, 1, 127], "tensors": {"step": {"logits": {"max_abs": 1e-3, "relative": 1e-4}}}},
        "chain": {
            "windows": [0, 5, 10, 15],
            "steps": 64,
            "tensors": {
                name: {
                    "largest": scale * 0.05 * size,
                    "step": 64,
                    "by_step": [scale * 0.05 * size * (0.2 + step / 80 + 0.1 * _wave(step)) for step in steps],
                }
                for name, size in (("logits", 1.0), ("next_state", 0.6), ("present_key_values.0.key", 0.3))
            },
            "first_divergence": None,
        },
        "free-running": {
            "prompts": 32,
            "prompt_tokens": 32,
            "new_tokens": 64,
            "identical": 20,
            "agreement": [64] * 20 + [3, 9, 11, 17, 20, 25, 33, 40, 48, 52, 60, 63],
            "agreement_mean": 51.9,
            "agreement_median": 64.0,
            "divergent_share": 0.19,
            "first_divergence_normalised": 0.81,
            "divergences": [{"prompt": 21, "token": 3, "margin": 0.02, "relative_margin": 0.01, "near_tie": False}],
        },
        "certificate": _certificate(scale),
        "long-run": _long_run(scale),
    }
    return data[level]


def _checks(level: str, precision: str, scale: float) -> tuple[Check, ...]:
    def gate(name: str, metric: str, value: float, limit: float, ends: tuple[float, float] | None = None) -> Check:
        return measured(metric, name, value, interval=ends, limit=limit, precision=precision)

    checks: dict[str, tuple[Check, ...]] = {
        "contract": tuple(Check(name=f"{name}: names and dtypes", passed=True) for name in ("step", "prefill", "head")),
        "one-step": tuple(
            gate(f"step: {name}", "tensor_error", scale * 0.01 / index, 0.05)
            for index, name in enumerate(
                ("logits", "next_state", *(f"present_key_values.{i}.{k}" for i in range(6) for k in ("key", "value"))),
                start=1,
            )
        ),
        "chain": (gate("logits", "chain_error", scale * 0.05, 0.15),),
        "free-running": (
            gate("first divergence", "divergence_margin", scale * 0.05, 0.2),
            measured("agreement", "agreement", 0.81),
        ),
        "certificate": (
            gate("K = 20, 0-128: excess", "gap_excess", scale * 1e-4, 3e-3, (scale * -1e-4, scale * 3e-4)),
            measured("smallest_passes", "smallest K, 0-128", 6.0),
        ),
        "long-run": (
            gate("growth, chained", "growth", scale * 2e-5, 5e-3, (scale * -1e-5, scale * 5e-5)),
        ),
    }  # fmt: skip
    return checks[level]


LEVELS = ("contract", "one-step", "chain", "corpus", "free-running", "certificate", "long-run")


def _level(level: str, name: str, precision: str, arithmetic: str, scale: float) -> LevelResult:
    if level != "corpus":
        return LevelResult(level=level, target=name, checks=_checks(level, precision, scale), data=_data(level, scale))
    regimes = (("step", 1.0), ("prefill", 1.1), ("handover", 0.9))
    rows = [_comparison(name, precision, arithmetic, scale, regime, shift) for regime, shift in regimes]
    if name.startswith("rtx-"):
        names: dict[str, Any] = {"target": name, "runtime": "tensorrt-rtx", "graph": "step", "precision": "fp16"}
        rows.append(Comparison(**names, regime="step", label=f"step ({COMPILED})", status=COMPILED))
    return corpus_result(name, rows)


def _sample(targets: int = 3, levels: tuple[str, ...] = LEVELS) -> dict[str, Any]:
    chosen = TARGETS[:targets]
    report = ParityReport(
        levels=(not_compared(), *(_level(level, *target) for level in levels for target in chosen)),
        tolerances=load_tolerances().to_dict(),
        text={
            "source": "heldout.txt",
            "sha256": "d8" * 32,
            "offset": 11661,
            "tokens": 4097,
            "windows": 16,
            "window": WINDOW,
        },
        notes=("handover rows score the second half of each window: 2,064 of 4,096 tokens",),
        method="mean over windows of the paired difference, 95 % Student t interval with windows as units",
        versions={"torch": "2.13.0+cpu", "onnxruntime": "1.31.1", "numpy": "2.4.6"},
        environment={
            "system": "Linux 6.1",
            "architecture": "x86_64",
            "processor": "AMD EPYC",
            "cores": 2,
            "python": "3.11.7",
        },
        model={
            "checkpoint": "4f" * 32,
            "parameters": 396288,
            "config": {
                "model_type": "context_ready_transformer",
                "hidden_size": 128,
                "num_hidden_layers": 1,
                "vocab_size": 256,
            },
        },
        created="2026-11-22T12:00:00+00:00",
        command="crt-export validate build/demo --text heldout.txt --level all",
    )
    return report.to_dict()


@pytest.fixture(scope="session")
def make_report() -> Callable[..., dict[str, Any]]:
    """``make_report(targets=3, levels=LEVELS)``: a new document to change."""
    return _sample


@pytest.fixture
def sample_report() -> dict[str, Any]:
    """A report that passed, with every level of three targets; a new document to change."""
    return _sample()


@pytest.fixture(scope="session")
def schema_path() -> Path:
    """The published schema."""
    return Path(str(definition_path("validate", "report.schema.json")))
