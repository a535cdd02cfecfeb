"""The ms a token of ``inspect``: there where this very bundle was measured, with machine and date, and nowhere else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crt_export.cli import main

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "bundle-v1"
Make = Callable[..., Path]


def table(text: str) -> dict[str, list[str]]:
    """Cells of every row of the summary by its first one."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("target "))
    return {line.split()[0]: line.split() for line in lines[first : first + 3]}


def test_a_given_benchmark_adds_the_column_and_says_where_and_when(
    make_bench: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_bench(tmp_path / "speed.json")
    assert main(["inspect", str(GOLDEN), "--bench", str(file)]) == 0
    text = capsys.readouterr().out
    rows = table(text)
    assert [rows[name][-1] for name in ("target", "ort-cpu-fp32", "ort-cpu-int8")] == ["ms", "12.3", "0.312"]
    sentence = (
        "ms a token: median step, 64 tokens in the cache, batch 1, on two cores of something, 2 cores, 2026-11-30"
    )
    assert f"{sentence} ({file})" in text
    assert max(map(len, text.splitlines()[3:6])) <= 80
    assert main(["inspect", str(GOLDEN), "--bench", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speed"]["ms"] == {"ort-cpu-int8": 0.3125, "ort-cpu-fp32": 12.345}


def test_a_target_that_was_not_measured_has_no_figure(
    make_bench: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_bench(tmp_path / "speed.json", targets={"ort-cpu-int8": 0.5})
    assert main(["inspect", str(GOLDEN), "--bench", str(file)]) == 0
    rows = table(capsys.readouterr().out)
    assert (rows["ort-cpu-fp32"][-1], rows["ort-cpu-int8"][-1]) == ("-", "0.5")


def test_a_benchmark_beside_the_bundle_is_found(
    make_bench: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(GOLDEN, bundle)
    assert main(["inspect", str(bundle)]) == 0
    assert table(capsys.readouterr().out)["target"][-1] == "size"
    make_bench(tmp_path / "bundle.bench.json")
    assert main(["inspect", str(bundle)]) == 0
    assert table(capsys.readouterr().out)["ort-cpu-fp32"][-1] == "12.3"


def test_what_another_bundle_took_is_never_shown(
    make_bench: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(GOLDEN, bundle)
    file = make_bench(tmp_path / "bundle.bench.json", identity="0" * 64)
    assert main(["inspect", str(bundle)]) == 0
    said = capsys.readouterr()
    assert table(said.out)["target"][-1] == "size"
    assert "no ms a token is shown" in said.err
    assert "measured another bundle" in said.err
    assert main(["inspect", str(bundle), "--bench", str(file)]) == 2
    assert f"found '{'0' * 64}'" in capsys.readouterr().err


def test_a_checkpoint_has_no_benchmark(tiny_checkpoint: Path) -> None:
    assert main(["inspect", str(tiny_checkpoint), "--bench", "x.json"]) == 2


def test_every_graph_is_shown_with_who_opens_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(GOLDEN), "--full"]) == 0
    text = capsys.readouterr().out
    graphs = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["graphs"]
    assert {role for graph in graphs for role in graph["roles"]} >= {"session", "interchange", "validation"}
    for graph in graphs:
        assert f"{graph['file']} {', '.join(graph['roles'])} {graph['weights']}" in " ".join(text.split())
