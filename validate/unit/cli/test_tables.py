"""Tables of the command line: what a row says, and that a verdict is never softened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.bundle import open_bundle
from crt_export.cli.console import ProgressLine, write_json, write_table
from crt_export.cli.tables import (
    memory_of_rows,
    readable_size,
    write_bundle,
    write_report_tables,
    write_summary,
    write_verdict,
)
from crt_export.parity.metrics import Check, measured
from crt_export.parity.report import Comparison, ParityReport, corpus_result

LIMITS = {"delta_nll": 1e-3, "max_abs_logit_error": 1e-3, "mean_kl": 1e-3, "top1_agreement": 0.99}


def gates(**values: float) -> tuple[Check, ...]:
    ends = {"delta_nll": (-1e-6, 3e-6), "gap_delta_nll": (-3e-4, 7e-4)}
    return tuple(
        measured(key, f"step: {key}", value, interval=ends.get(key), limit=LIMITS.get(key), precision="fp32", tokens=32)
        for key, value in values.items()
    )


ROW = Comparison(
    target="ort-cpu-fp32",
    runtime="onnxruntime",
    graph="step",
    precision="fp32",
    regime="step",
    label="step",
    tokens=4096,
    steps=256,
    nll=1.25,
    reference_nll=1.25,
    arithmetic="fp32",
    checks=gates(delta_nll=1e-6, max_abs_logit_error=2.7e-6, mean_kl=1e-9, top1_agreement=1.0),
)


def report_of(*rows: Comparison, notes: tuple[str, ...] = ()) -> ParityReport:
    text = {"source": "t", "sha256": "0", "offset": 0, "tokens": 4097, "windows": 16, "window": 256}
    return ParityReport(levels=(corpus_result(ROW.target, rows),), tolerances={}, text=text, notes=notes)


def regime_line(row: Comparison, capsys: pytest.CaptureFixture[str]) -> str:
    write_report_tables(report_of(row))
    return capsys.readouterr().out.splitlines()[2]


def changed(row: Comparison = ROW, **values: Any) -> Comparison:
    return dataclasses.replace(row, **values)


def test_regime_that_ran_shows_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    line = regime_line(ROW, capsys)
    for figure in ("4,096", "3.4903", "+1.0e-06 [-1.0e-06, +3.0e-06]", "2.7e-06", "1e-09", "100.000%", "passed"):
        assert figure in line


def test_failed_regime_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert regime_line(changed(checks=gates(top1_agreement=0.5)), capsys).endswith("FAILED")


def test_compiled_engine_is_never_shown_as_passed(capsys: pytest.CaptureFixture[str]) -> None:
    engine = changed(status="compiled", label="step (compiled)", nll=None, reference_nll=None, checks=())
    line = regime_line(engine, capsys)
    assert line.endswith("compiled")
    assert "passed" not in line
    write_summary(report_of(ROW, engine))
    out = capsys.readouterr().out
    assert out.splitlines()[2].split()[-1] == "compiled"
    assert "1 compiled engine (ort-cpu-fp32) did not run" in out


def test_emulated_arithmetic_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert regime_line(changed(arithmetic="fp32-emulated"), capsys).endswith("passed, fp32-emulated")


def test_likelihood_that_gates_nothing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert regime_line(changed(better_than_chance=False), capsys).endswith("passed, nll not gated")
    assert regime_line(changed(better_than_chance=True), capsys).endswith("passed")


def test_regime_gap_shows_the_gated_excess_and_what_it_is_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    checks = gates(delta_nll=1e-6, gap_delta_nll=2e-4)
    gap = changed(regime="regime-gap", label="step", checks=checks, positions=(0, 128))
    write_report_tables(report_of(gap))
    lines = capsys.readouterr().out.splitlines()
    assert "regime-gap 0-128" in lines[2]
    assert "step 3.4903  excess +2.0e-04 [-3.0e-04, +7.0e-04]" in lines[2]
    assert "+1.0e-06" not in lines[2]
    assert lines[3].startswith("note: regime-gap compares K passes with the steps of the same target")


def test_regime_gap_of_the_model_itself_has_no_excess(capsys: pytest.CaptureFixture[str]) -> None:
    delta = measured("delta_nll", "step: delta_nll", 1e-6, interval=(-1e-6, 3e-6))
    line = regime_line(changed(regime="regime-gap", checks=(delta,)), capsys)
    assert "step 3.4903  +1.0e-06 [-1.0e-06, +3.0e-06]" in line
    assert line.endswith("run")


def test_notes_of_the_report_follow_the_table_and_are_counted_in_the_summary(
    capsys: pytest.CaptureFixture[str],
) -> None:
    notes = ("windows of 100 tokens instead of 256: capacity of x is 100", "pytorch-half ran [4] of 16 windows")
    write_report_tables(report_of(ROW, notes=notes))
    assert capsys.readouterr().out.splitlines()[3:5] == [f"note: {note}" for note in notes]
    write_summary(report_of(ROW, notes=notes))
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 notes on what was shortened or left out: --full")


def test_summary_has_one_row_per_target_and_every_failure(capsys: pytest.CaptureFixture[str]) -> None:
    write_summary(report_of(ROW), {"ort-cpu-fp32": 1536})
    (line,) = capsys.readouterr().out.splitlines()[2:]
    assert line.split() == ["ort-cpu-fp32", "3.4903", "+1.0e-6", "±2.0e-6", "100.00%", "4/4", "passed", "1.5", "KiB"]
    failed = report_of(changed(checks=gates(delta_nll=1e-6, top1_agreement=0.5)))
    write_summary(failed)
    out = capsys.readouterr().out.splitlines()
    assert out[2].split()[-2:] == ["1/2", "FAILED"]
    assert out[3].startswith("failed: ort-cpu-fp32 corpus: step: top1_agreement: top-1 agreement 50.00%")
    write_verdict(failed)
    words = "parity: FAILED, not compared with your own model. 1 of 2 gates failed on 1 target."
    assert capsys.readouterr().out == f"{words}\n"


def test_plain_table_is_aligned_and_free_of_drawing(capsys: pytest.CaptureFixture[str]) -> None:
    write_table(("name", "size>"), [("a", "1"), ("long", "1000")], title="sizes")
    assert capsys.readouterr().out == "sizes\nname  size\na        1\nlong  1000\n"


def test_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json({"figure": float("nan")})


def test_progress_in_a_pipe_is_one_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine() as progress:
        for done in range(3):
            progress("export step", done, 3)
        progress("compile", 0, 0)
    captured = capsys.readouterr()
    assert captured.err == "export step\ncompile\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")]
)
def test_readable_size(size: int, text: str) -> None:
    assert readable_size(size) == text


def test_memory_of_a_row_follows_from_the_declaration_target_by_target(
    tiny_bundle: Callable[..., tuple[Path, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer of four heads of 8; one target says that its caches are float16."""
    path = tiny_bundle("crt", num_hidden_layers=1, unroll_steps=3)[0]
    files = open_bundle(path, allow_unvalidated=True)
    found = memory_of_rows(files)
    assert list(found) == list(files.manifest["targets"])
    for name, target in files.manifest["targets"].items():
        item = 2 if target["cache_dtype"] == "float16" else 4
        sizes = {"state_bytes": 32 * 4, "cache_bytes": target["capacity"] * 2 * 32 * item}
        assert found[name] == {"capacity": target["capacity"], **sizes}
    write_bundle(files, path)
    text = " ".join(capsys.readouterr().out.split())
    assert "a row of ort-cpu-fp32, chunked, rtx-sm80-fp16 holds 128 bytes of state, and 16.0 KiB of caches" in text
    assert "a row of broken holds 128 bytes of state, and 8.0 KiB of caches of 64 tokens" in text
