from __future__ import annotations

from typing import Any

import pytest

from crt_export.cli.console import ProgressLine, write_json, write_table
from crt_export.cli.tables import readable_size, write_parity_table

ROW: dict[str, Any] = {
    "target": "ort-cpu-fp32",
    "runtime": "onnxruntime",
    "graph": "step",
    "precision": "fp32",
    "regime": "step chain",
    "tokens": 4096,
    "steps": 256,
    "nll": 1.25,
    "reference_nll": 1.25,
    "delta_nll": 1e-6,
    "delta_nll_ci": [-1e-6, 3e-6],
    "perplexity": 3.4903,
    "reference_perplexity": 3.4903,
    "max_abs_logit_error": 2.7e-6,
    "mean_kl": 1e-9,
    "top1_agreement": 1.0,
    "arithmetic": "fp32",
    "status": "run",
    "passed": True,
}
FIGURES = (
    "tokens", "steps", "nll", "reference_nll", "delta_nll", "delta_nll_ci", "perplexity",
    "reference_perplexity", "max_abs_logit_error", "mean_kl", "top1_agreement",
)  # fmt: skip


def parity_lines(row: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    write_parity_table({"passed": True, "rows": [row]})
    return capsys.readouterr().out.splitlines()[-1]


def test_row_that_ran_shows_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    line = parity_lines(ROW, capsys)
    for figure in ("4,096", "3.4903", "+1.0e-06 [-1.0e-06, +3.0e-06]", "2.7e-06", "100.000%", "passed"):
        assert figure in line


def test_failed_row_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity_lines({**ROW, "passed": False}, capsys).endswith("FAILED")


def test_compiled_row_is_never_shown_as_passed(capsys: pytest.CaptureFixture[str]) -> None:
    line = parity_lines({**ROW, **dict.fromkeys(FIGURES), "status": "compiled", "passed": None}, capsys)
    assert line.endswith("compiled")
    assert "passed" not in line


def test_emulated_arithmetic_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity_lines({**ROW, "arithmetic": "fp32-emulated"}, capsys).endswith("passed, fp32-emulated")


def test_likelihood_that_gates_nothing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity_lines({**ROW, "better_than_chance": False}, capsys).endswith("passed, nll not gated")
    assert parity_lines({**ROW, "better_than_chance": True}, capsys).endswith("passed")


def test_regime_gap_shows_the_gated_excess_and_what_it_is_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    gap = {**ROW, "regime": "regime-gap", "excess_gap": 2e-4, "excess_gap_ci": [-3e-4, 7e-4], "positions": [0, 128]}
    write_parity_table({"passed": True, "rows": [ROW, gap]})
    line, note = capsys.readouterr().out.splitlines()[-2:]
    assert "regime-gap 0-128" in line
    assert "step 3.4903  excess +2.0e-04 [-3.0e-04, +7.0e-04]" in line
    assert "+1.0e-06" not in line
    assert note.startswith("note: regime-gap compares K passes with the steps of the same target")


def test_regime_gap_of_the_model_itself_has_no_excess(capsys: pytest.CaptureFixture[str]) -> None:
    line = parity_lines({**ROW, "regime": "regime-gap", "excess_gap": None, "passed": None}, capsys)
    assert "step 3.4903  +1.0e-06 [-1.0e-06, +3.0e-06]" in line
    assert line.endswith("run")


def test_notes_of_the_report_follow_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    notes = ["windows of 100 tokens instead of 256: capacity of x is 100", "pytorch-half ran [4] of 16 windows"]
    write_parity_table({"passed": True, "rows": [ROW], "notes": notes})
    assert capsys.readouterr().out.splitlines()[-2:] == [f"note: {note}" for note in notes]


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
