"""The corpus level: a check per gate, figures that hang together, and a text that the model does not know."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from short_setup import short_setup

from crt_export.checkpoint import load_checkpoint
from crt_export.parity import ParityOptions, ParityReport, load_tolerances, validate_bundle
from crt_export.parity.corpus import check_text
from crt_export.parity.levels import CORPUS
from crt_export.parity.reference import STEP
from crt_export.parity.report import LevelResult
from crt_export.parity.scores import reference_nll
from crt_export.text import TokenText

WINDOW = 16
OPTIONS = ParityOptions(
    validation_tokens=256, window=WINDOW, short_reason="test of the corpus level", threads=1, levels=(CORPUS,)
)
GATES = (
    "runs", "delta_nll", "top1_agreement", "relative_logit_error", "max_abs_logit_error", "mean_kl", "top10_overlap",
    "probability_change",
)  # fmt: skip
CONSISTENT = ("prefill",)


@pytest.fixture(scope="module")
def report(parity_bundle: Path, heldout_text: Path) -> ParityReport:
    return validate_bundle(parity_bundle, text=heldout_text, options=OPTIONS)


def _level(report: ParityReport, target: str) -> LevelResult:
    return next(result for result in report.levels if (result.level, result.target) == (CORPUS, target))


@pytest.fixture(scope="module")
def regimes(report: ParityReport) -> dict[str, Any]:
    """Facts and statistics of the regimes; a regime gap has none of its own."""
    found = _level(report, "ort-cpu-fp32").data["regimes"]
    return {name: data for name, data in found.items() if data["regime"] != "regime-gap"}


def test_every_gate_of_every_regime_is_a_check_with_its_key(report: ParityReport) -> None:
    result = _level(report, "ort-cpu-fp32")
    expected = [
        *(f"{regime}: {gate}" for regime in ("step", "prefill", "handover")
          for gate in (*GATES, *(("consistency",) if regime in CONSISTENT else ()))),
        "regime-gap 0-16: delta_nll",
        "regime-gap 0-16: gap_delta_nll",
    ]  # fmt: skip
    assert result.passed, result.failures
    assert [check.name for check in result.checks] == expected
    for check in result.checks:
        assert check.value is not None
        if check.passed is not None and not check.name.endswith("runs"):
            precision, key = check.tolerance.split(".")
            assert check.limit == getattr(load_tolerances().precisions[precision], key), check.name


def test_a_row_says_what_its_checks_say(parity_bundle: Path, heldout_text: Path, tmp_path: Path) -> None:
    tight = load_tolerances()
    for limit in ("relative_logit_error", "max_abs_logit_error"):
        object.__setattr__(tight.precisions["fp32"], limit, 1e-12)  # a limit that rounding alone breaks
    report = validate_bundle(parity_bundle, text=heldout_text, options=OPTIONS, tolerances=tight)
    result = _level(report, "ort-cpu-fp32")
    rows = [failure for row in report.rows if row.target == "ort-cpu-fp32" for failure in row.failures]
    assert len(rows) == 6
    assert rows == [failure for check in result.checks for failure in check.failures]
    assert len(report.failures) == len(rows), "one failure is told once"


def test_data_has_the_promised_keys(regimes: dict[str, Any]) -> None:
    assert list(regimes) == ["step", "prefill", "handover"]
    for figures in regimes.values():
        assert set(figures) >= {
            "perplexity_ci", "perplexity_ratio", "perplexity_ratio_ci", "log_perplexity_correlation",
            "delta_nll_bootstrap_ci", "kl", "kl_histogram", "probability_change", "top1_all",
            "top1_all_ci", "by_position", "nll", "reference_nll", "tokens", "positions",
        }  # fmt: skip
        assert set(figures["kl"]) >= {"median", "p90", "p95", "p99", "p999", "max", "min"}
        assert set(figures["probability_change"]) >= {
            "mean", "mean_ci", "min", "p1", "p5", "p10", "p25", "median", "p75", "p90", "p95", "p99", "max",
        }  # fmt: skip


@pytest.mark.parametrize("figure", ["kl", "probability_change"])
def test_percentiles_rise_from_the_smallest_to_the_largest(regimes: dict[str, Any], figure: str) -> None:
    order = ["min", "p001", "p1", "p5", "p10", "p25", "median", "p75", "p90", "p95", "p99", "p999", "max"]
    for figures in regimes.values():
        values = [figures[figure][name] for name in order if name in figures[figure]]
        assert values == sorted(values)
        assert values[0] < values[-1]


def test_figures_hang_together(report: ParityReport, regimes: dict[str, Any]) -> None:
    rows = {row.regime: row for row in report.rows if row.target == "ort-cpu-fp32"}
    for regime, figures in regimes.items():
        row = rows[regime]
        assert row.nll is not None
        delta = row.value("delta_nll")
        assert delta is not None
        assert sum(figures["kl_histogram"]["counts"]) == row.tokens
        assert len(figures["kl_histogram"]["edges"]) == len(figures["kl_histogram"]["counts"]) + 1
        assert figures["perplexity_ci"][0] < row.perplexity < figures["perplexity_ci"][1]
        assert np.log(figures["perplexity_ratio"]) == pytest.approx(delta, abs=1e-12)
        assert figures["delta_nll_bootstrap_ci"][0] <= delta <= figures["delta_nll_bootstrap_ci"][1]
        assert figures["log_perplexity_correlation"] == pytest.approx(1)


def test_spans_of_positions_cover_what_was_scored_once(report: ParityReport, regimes: dict[str, Any]) -> None:
    assert [(span["start"], span["stop"]) for span in regimes["step"]["by_position"]] == [
        (0, 1), (1, 2), (2, 4), (4, 8), (8, 16),
    ]  # fmt: skip
    assert [(span["start"], span["stop"]) for span in regimes["handover"]["by_position"]] == [(7, 8), (8, 16)]
    rows = {row.regime: row for row in report.rows if row.target == "ort-cpu-fp32"}
    for regime, figures in regimes.items():
        spans = figures["by_position"]
        widths = [span["stop"] - span["start"] for span in spans]
        mean = np.average([span["delta_nll"] for span in spans], weights=widths)
        assert mean == pytest.approx(rows[regime].value("delta_nll"), abs=1e-12)


def test_the_report_survives_json_with_its_levels(report: ParityReport) -> None:
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert ParityReport.from_dict(document).to_dict() == document
    assert "4,000 resamples" in document["method"]
    assert "seed" in document["method"]


def test_the_same_run_gives_the_same_figures(report: ParityReport, parity_bundle: Path, heldout_text: Path) -> None:
    again = validate_bundle(parity_bundle, text=heldout_text, options=OPTIONS)
    assert [result.to_dict() for result in again.levels] == [result.to_dict() for result in report.levels]


# --- the text
@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random bytes as token ids."""
    path = tmp_path_factory.mktemp("noise") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, 512))
    return path


def test_random_ids_are_noted_for_a_model_that_has_learnt_nothing(parity_bundle: Path, noise: Path) -> None:
    report = validate_bundle(parity_bundle, tokens=noise, options=OPTIONS)
    assert report.passed, report.failures
    assert _level(report, "pytorch-fp32").passed is None
    assert any("looks random or shuffled" in note for note in report.notes)


@pytest.mark.parametrize("level", ["corpus", "one-step"])
def test_random_bytes_instead_of_the_recorded_text_fail(
    parity_bundle: Path, noise: Path, tmp_path: Path, sign_again: Callable[[Path], None], level: str
) -> None:
    bundle = Path(shutil.copytree(parity_bundle, tmp_path / "bundle"))
    report = json.loads((bundle / "report.json").read_text())
    for regime in (r for level in report["levels"] for r in level["data"].get("regimes", {}).values()):
        regime["reference_nll"] = 1.2  # as if the model had learnt its text
    (bundle / "report.json").write_text(json.dumps(report))
    sign_again(bundle)
    found = validate_bundle(bundle, tokens=noise, options=dataclasses.replace(OPTIONS, levels=(level,)))
    assert not found.passed
    assert len(found.failures) == 1
    assert found.failures[0].startswith("pytorch-fp32 corpus (text): this is not text the model knows")
    assert "a uniform guess costs 5.545 and the bundle's report records 1.200" in found.failures[0]
    assert "times as often as uniform noise" in found.failures[0]


def _judge(checkpoint_folder: Path, ids: np.ndarray, recorded: float | None) -> LevelResult:
    checkpoint = load_checkpoint(checkpoint_folder)
    text = TokenText(ids=ids.astype(np.int64), source="test")
    options = ParityOptions(validation_tokens=512, window=64, short_reason="test of the text gate")
    setup = short_setup(checkpoint, text, options, recorded_nll=recorded)
    return check_text(setup, float(reference_nll(setup.reference, STEP, 1).mean()))


def test_the_demo_knows_its_text_and_no_noise(demo_checkpoint: Path, real_text: TokenText) -> None:
    """Of a trained model: its own text passes, its bytes shuffled or drawn at random do not."""
    known = _judge(demo_checkpoint, real_text.ids[:1024], None)
    nll = known.data["text"]["nll"]
    assert (known.passed, known.notes) == (None, ())
    assert nll < 2
    generator = np.random.default_rng(0)
    assert _judge(demo_checkpoint, real_text.ids[:1024], nll).passed
    (check,) = _judge(demo_checkpoint, real_text.ids[:1024], nll).checks
    assert check.tolerance == "shared.learnt_share"
    drawn, shuffled = generator.integers(0, 256, 1024), generator.permutation(real_text.ids[:4096])[:1024]
    for ids in (drawn, shuffled):
        judged = _judge(demo_checkpoint, ids, nll)
        assert judged.passed is False
        assert judged.data["text"]["nll"] > 3 * nll
        unrecorded = _judge(demo_checkpoint, ids, None)
        assert unrecorded.passed is None
        assert "looks random or shuffled" in unrecorded.notes[0]
    assert _judge(demo_checkpoint, drawn, nll).data["text"]["nll"] > np.log(256)


def test_a_record_of_a_model_that_knew_little_gates_nothing(demo_checkpoint: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 1024)
    assert _judge(demo_checkpoint, noise, 0.96 * np.log(256)).passed is None
