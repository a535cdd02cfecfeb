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
