"""A benchmark's JSON against its schema, and the page that is made of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from crt_export.bench import report as records
from crt_export.bench.report import KINDS, MEASURED, NOT_RUN, BenchReport
from crt_export.cli.report import report as report_verb
from crt_export.errors import InputError
from crt_export.parity import ParityReport
from crt_export.report.output import render_html
from crt_export.report.reading import (
    bench_schema,
    checked_bench,
    read_bench,
    read_document,
    read_report,
    schema_problems,
)

HOSTILE = "<script>alert(1)</script>{{ 7 * 7 }} $\\frac{1}{0}$ \"'&"
VOID = {"meta", "link", "col", "br"}
#: Record of the package -> its place in the schema's definitions.
PARTS = {
    records.Candidate: "candidate",
    records.Load: "load",
    records.StepFigures: "step",
    records.PrefillFigures: "prefill",
    records.Memory: "memory",
    records.ModelSize: "model",
    records.Quantiles: "quantiles",
}


def step(position: int, p50: float, **more: Any) -> records.StepFigures:
    times = {name: p50 * factor for name, factor in (("p10_ms", 0.9), ("p90_ms", 1.2), ("p99_ms", 1.5), ("max_ms", 2))}
    moved = records.StepBytes(weights=150_000_000, cache=6_000_000, states=0, logits=128_000, total=156_128_000)
    floor = {"bytes": moved, "flops": 10**8, "floor_ms": 5.0, "compute_floor_ms": 0.9, "over_floor": p50 / 5.0}
    rest = {"samples": 60, "p50_ms": p50, "mean_ms": p50, "tokens_per_s": 1e3 / p50}
    return records.StepFigures(position=position, batch=1, **times, **rest, **{**floor, **more})


def sample(name: str = "ort-cpu-int8") -> BenchReport:
    """Two positions, two prompts, a baseline without floor, one that did not run."""
    times = {tokens: {"p50_s": 0.01 * tokens, "p90_s": 0.011 * tokens} for tokens in (16, 64)}
    prompts = tuple(
        records.PrefillFigures(tokens=tokens, method=method, passes=passes, chunk=None, samples=3, **times[tokens])
        for tokens in times
        for method, passes in (("default", None), ("passes", 5))
    )
    model = records.ModelSize(
        name="d5", model_type="context_ready_transformer", hidden_size=1120, caches=5, vocab_size=32000,
        parameters=157_094_080,
    )  # fmt: skip
    target = records.Candidate(
        name=name, kind="target", status=MEASURED, load=records.Load(open_s=0.8, first_token_s=0.9),
        step=(step(64, 6.2, runtime_overhead=0.031), step(1000, 7.7)), prefill=prompts,
        memory=records.Memory(weight_file=260 << 20, pss_step=300 << 20),
    )  # fmt: skip
    eager = records.Candidate(
        name="pytorch-eager", kind="pytorch-eager", status=MEASURED,
        step=(step(64, 38.0, bytes=None, floor_ms=None, over_floor=None),),
    )  # fmt: skip
    absent = records.Candidate(name="pytorch-compile", kind="pytorch-compile", status=NOT_RUN, reason="no compiler")
    rates = records.Quantiles(p10=27.0, p50=30.0, p90=31.2, samples=(27.0, 30.0, 31.2))
    ratio = records.Ratio(of=name, against="pytorch-eager", what="step", at=64, ratio=6.1, low=5.9, high=6.4, rounds=10)
    return BenchReport(
        created="2026-11-22T21:40:00+00:00", command="crt-export bench d5", crt_export="0.1.0",
        hardware={"processor": "two cores", "cores": 2}, versions={"numpy": "2.4"}, bundle={"name": "d5"}, model=model,
        options={"rounds": 10, "positions": [64, 1000]},
        bandwidth=records.Bandwidth(threads=2, bytes=1 << 28, read_gb_s=rates),
        compute=records.Compute(threads=2, gflop_s=rates), candidates=(target, eager, absent),
        ratios=(ratio, dataclasses.replace(ratio, what="prefill", at=16)), notes=("a note",),
    )  # fmt: skip


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(sample().to_dict())


class Balanced(HTMLParser):
    """The words of a page; every element is closed where it was opened, and no id is used twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


# --- schema
def test_a_benchmark_fits_the_schema_as_it_is_and_read_from_a_file(tmp_path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(bench_schema())
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(sample().to_dict()), encoding="utf-8")
    document = read_bench(path)
    jsonschema.Draft202012Validator(bench_schema()).validate(document)
    assert document == read_document(path)
    assert document["ratios"][1]["tokens"] == 16


def test_the_schema_names_every_key_that_the_package_writes() -> None:
    parts = {kind: bench_schema()["$defs"][name] for kind, name in PARTS.items()}
    for kind, part in parts.items():
        names = {field.name for field in dataclasses.fields(kind)}
        assert set(part["properties"]) == set(part["required"]) == names, kind
    whole = {field.name for field in dataclasses.fields(BenchReport)} | {"format", "format_version"}
    assert set(bench_schema()["properties"]) == set(bench_schema()["required"]) == whole
    assert tuple(parts[records.Candidate]["properties"]["kind"]["enum"]) == KINDS


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d["candidates"][0]["step"][0].update(p50_ms="fast"), "step[0].p50_ms: expected number"),
        (lambda d: d["candidates"][1].update(kind="racing"), "expected one of 'target'"),
        (lambda d: d.update(candidates=[]), "candidates: expected 1 items, found 0"),
        (lambda d: d.update(more=1), "unknown key 'more'"),
        (lambda d: d.update(format_version=2), "benchmark of version 2"),
        (lambda d: d.update(format="else"), "expected a benchmark"),
    ],
)
def test_a_damaged_benchmark_is_refused_with_the_place(damage: Callable[[Any], object], words: str) -> None:
    document = json.loads(json.dumps(sample().to_dict()))
    damage(document)
    with pytest.raises(InputError) as caught:
        checked_bench(document, "bench.json")
    assert words in str(caught.value).replace("at least 1", "1")


def test_a_benchmark_is_no_parity_report(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(sample().to_dict()), encoding="utf-8")
    with pytest.raises(InputError, match="expected a parity report"):
        read_report(path)


# --- page
def test_the_page_has_every_table_and_plot(page: str) -> None:
    text = " ".join(" ".join(Balanced(page).words).split())
    for words in ("6.2 ms a token", "161 tokens a second", "1.24 times the floor", "a note", "no compiler"):
        assert words in text, words
    for words in ("Steps", "Against others", "Time to first token", "Load and memory", "Step and floor", "read rate"):
        assert words in text, words
    assert page.count("<svg class") == 0
    assert page.count('role="img"') == 4
    assert "[5.9, 6.4]" in text
    assert "3.1 %" in text
    assert page == render_html(sample().to_dict())


def test_a_target_that_did_not_run_still_has_a_page() -> None:
    absent = records.Candidate(name="gone", kind="target", status=NOT_RUN, reason="no such device")
    report = dataclasses.replace(sample(), candidates=(absent,), ratios=(), bandwidth=None, compute=None)
    assert list(schema_problems(report.to_dict(), bench_schema())) == []
    text = " ".join(Balanced(render_html(report.to_dict())).words)
    assert "gone did not run: no such device" in text


def test_nothing_in_a_benchmark_can_be_markup() -> None:
    page = render_html(dataclasses.replace(sample(HOSTILE), notes=(HOSTILE,), command=HOSTILE).to_dict())
    assert "<script" not in page
    assert HOSTILE in "".join(Balanced(page).words)


def test_a_benchmark_becomes_a_section_of_a_validation(sample_report: dict[str, Any]) -> None:
    page = render_html(ParityReport.from_dict({**sample_report, "levels": []}), sample().to_dict())
    text = " ".join(Balanced(page).words)
    assert 'id="speed"' in page
    assert "Step and floor" in text
    assert "161 tokens a second" in text


def test_the_verb_takes_a_benchmark_and_refuses_junit_of_it(tmp_path: Path) -> None:
    source, output = tmp_path / "bench.json", tmp_path / "page.html"
    source.write_text(json.dumps(sample().to_dict()), encoding="utf-8")
    words = [str(source), "--output", str(output)]
    assert CliRunner().invoke(report_verb, words, catch_exceptions=False).exit_code == 0
    assert "6.2 ms a token" in output.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="is a benchmark"):
        CliRunner().invoke(report_verb, [*words, "--junit", str(tmp_path / "j.xml")], catch_exceptions=False)
