"""A whole run: real runtimes on a tiny bundle, in processes of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crt_export.bench import runner
from crt_export.bench.options import BenchOptions, _Room, plan_from_options
from crt_export.bench.report import BenchReport
from crt_export.bench.run import run_bench
from crt_export.bench.runner import prompt_rows
from crt_export.cli import main
from crt_export.config import ModelConfig
from crt_export.errors import InputError
from crt_export.report.reading import bench_schema, schema_problems

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle-v1"
QUICK = BenchOptions(
    target="ort-cpu-int8",
    positions=(5, 0),
    prompt_tokens=(3, 6),
    rounds=2,
    prefill_rounds=2,
    steps=4,
    threads=1,
    probe_bytes=1 << 20,
    pause_s=0,
)


def _changed(options: BenchOptions, **changes: object) -> BenchOptions:
    return BenchOptions(**{**vars(options), **changes})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> BenchReport:
    other = tmp_path_factory.mktemp("bench") / "copy"
    shutil.copytree(GOLDEN, other)
    against = ("ort-cpu-fp32", "pytorch-eager", str(other))
    return run_bench(GOLDEN, _changed(QUICK, against=against, passes=(2, "exact")), command="crt-export bench")


def test_everybody_is_measured_at_every_position_and_prompt(report: BenchReport) -> None:
    assert [c.name for c in report.candidates] == ["ort-cpu-int8", "ort-cpu-fp32", "pytorch-eager", "copy"]
    assert [c.kind for c in report.candidates] == ["target", "target", "pytorch-eager", "bundle"]
    for candidate in report.candidates:
        assert (candidate.status, candidate.reason) == ("measured", "")
        assert [(step.position, step.samples) for step in candidate.step] == [(5, 8), (0, 8)]
        for step in candidate.step:
            assert 0 < step.p10_ms <= step.p50_ms <= step.p90_ms <= step.p99_ms <= step.max_ms
        methods = {(row.tokens, row.method) for row in candidate.prefill}
        assert methods == {(tokens, method) for tokens in (3, 6) for method in ("default", "passes", "exact")}
        assert candidate.load is not None
        assert 0 < candidate.load.open_s < candidate.load.first_token_s


def test_the_floor_is_what_the_step_moves_at_the_bandwidth_of_the_run(report: BenchReport) -> None:
    assert report.bandwidth is not None
    bytes_of = {}
    for candidate in report.candidates:
        step = candidate.step[0]
        assert step.bytes is not None
        assert step.floor_ms == pytest.approx(step.bytes.total / report.bandwidth.read_gb_s.p90 / 1e6)
        assert step.over_floor == pytest.approx(step.p50_ms / (step.floor_ms or 0))
        bytes_of[candidate.name] = step.bytes.weights
    # Linears of 16 x 16 are padded to blocks of 128, so int8 need not be smaller here.
    assert bytes_of["copy"] == bytes_of["ort-cpu-int8"]
    assert abs(bytes_of["pytorch-eager"] - bytes_of["ort-cpu-fp32"]) < 200
    engines = [candidate for candidate in report.candidates if candidate.kind != "pytorch-eager"]
    assert all(0 < (step.runtime_overhead or 0) < 1 for candidate in engines for step in candidate.step)


def test_ratios_judge_the_target_against_each_of_the_others(report: BenchReport) -> None:
    assert {ratio.of for ratio in report.ratios} == {"ort-cpu-int8"}
    found = {(ratio.against, ratio.what, ratio.at) for ratio in report.ratios}
    others = ("ort-cpu-fp32", "pytorch-eager", "copy")
    assert found == {
        (other, *at) for other in others for at in (("step", 5), ("step", 0), ("prefill", 3), ("prefill", 6))
    }
    assert all(0 < ratio.low <= ratio.ratio <= ratio.high for ratio in report.ratios)
    eager = report.candidate("pytorch-eager").step[0].p50_ms / report.candidates[0].step[0].p50_ms
    step = next(r for r in report.ratios if (r.against, r.what, r.at) == ("pytorch-eager", "step", 5))
    assert (step.ratio > 1) == (eager > 1)


def test_the_json_survives_a_round_trip_and_says_how_it_was_made(report: BenchReport) -> None:
    document = report.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert list(schema_problems(document, bench_schema())) == []
    assert (document["format"], document["format_version"]) == ("crt-export-bench", 1)
    assert {key: document["options"][key] for key in ("target", "positions", "steps", "threads")} == {
        "target": "ort-cpu-int8",
        "positions": [5, 0],
        "steps": 4,
        "threads": 1,
    }
    assert document["ratios"][0]["position"] == 5
    assert next(ratio for ratio in document["ratios"] if ratio["what"] == "prefill")["tokens"] == 3
    assert any("page cache" in note for note in document["notes"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": (10**6,)}, "position 1000000 and 4 steps exceed the capacity"),
        ({"prompt_tokens": (10**6,)}, "1000000 prompt tokens exceed the capacity"),
        ({"against": ("pytorch",)}, "neither a bundle's folder nor one of pytorch-eager"),
        ({"against": ("ort-cpu-int8",)}, "measured against itself, or named twice: ort-cpu-int8"),
        ({"target": "nothing"}, "unknown target 'nothing'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(changes: dict[str, object], message: str) -> None:
    options = _changed(QUICK, **changes)
    with pytest.raises(InputError, match=message):
        plan_from_options(GOLDEN, options)


def test_prompts_are_text_where_the_model_reads_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.array([3, 1, 2]))
    given = plan_from_options(GOLDEN, _changed(QUICK, tokens=ids, batch=2))
    assert [candidate.request["text"] for candidate in given.candidates] == [(3, 1, 2)]
    assert given.text.source == str(ids)
    monkeypatch.setattr(runner, "load_tokenizer", None)  # calling it would fail
    assert plan_from_options(GOLDEN, _changed(QUICK, tokens=ids)).text.ids == (3, 1, 2)
    monkeypatch.undo()
    default = plan_from_options(GOLDEN, _changed(QUICK, batch=2))
    assert len(default.text.ids) == 12
    rows = prompt_rows((3, 1, 2), 5, batch=2, tokens=4)
    assert rows.tolist() == [[3, 1, 2, 3], [1, 2, 3, 1]]
    random = prompt_rows((), 5, batch=2, tokens=40)
    assert random.shape == (2, 40)
    assert 0 <= random.min() < random.max() < 5
    assert np.array_equal(random, prompt_rows((), 5, batch=2, tokens=40))


def test_a_text_that_a_candidate_cannot_read_is_refused(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.array([10**6]))
    with pytest.raises(InputError, match="vocabulary"):
        plan_from_options(GOLDEN, _changed(QUICK, tokens=ids))
    with pytest.raises(InputError, match="prompts hold token id 600, and a model that is compared has 256"):
        _Room(batch=1, threads=1, capacity=8, text=(3, 600)).request("bundle", tiny_config().info)


def test_a_text_is_not_written_over(tmp_path: Path) -> None:
    text = tmp_path / "text.json"
    text.write_text("not a report", encoding="utf-8")
    assert main(["bench", str(GOLDEN), "--text", str(text), "--output", str(text)]) == 2
    assert text.read_text(encoding="utf-8") == "not a report"


def test_what_is_named_twice_is_measured_once() -> None:
    plan = plan_from_options(GOLDEN, _changed(QUICK, positions=(5, 5), prompt_tokens=(3, 6, 3), passes=(2, 2)))
    assert (plan.options.positions, plan.options.prompt_tokens, plan.methods) == ((5,), (3, 6), (None, 2))


def test_bundles_whose_folders_have_one_name_are_told_apart(tmp_path: Path) -> None:
    others = tuple(str(tmp_path / parent / "bundle") for parent in ("first", "second"))
    for other in others:
        shutil.copytree(GOLDEN, other)
    plan = plan_from_options(GOLDEN, _changed(QUICK, against=others))
    assert [candidate.name for candidate in plan.candidates] == ["ort-cpu-int8", *others]
    with pytest.raises(InputError, match="named twice"):
        plan_from_options(GOLDEN, _changed(QUICK, against=(others[0], others[0])))


def test_impossible_options_are_listed_all_at_once() -> None:
    with pytest.raises(InputError) as caught:
        BenchOptions(rounds=0, passes=("some",), threads=-1)
    for words in (
        "rounds must be at least 1, found 0",
        "passes must be a number",
        "threads must be 0 to 1024, found -1",
    ):
        assert words in str(caught.value)


def test_defaults_fit_a_cache_of_a_few_tokens(tiny_bundle: Callable[..., tuple[Path, object]]) -> None:
    bundle = tiny_bundle("crt", num_hidden_layers=1, unroll_steps=3)[0]
    plan = plan_from_options(bundle, BenchOptions(target="ort-cpu-fp32"))
    assert plan.target.capacity == 64
    assert (plan.options.steps, plan.options.positions, plan.options.prompt_tokens) == (20, (44,), (16, 64))


def test_the_command_prints_tables_for_an_unvalidated_plain_transformer_of_two_rows(
    tiny_bundle: Callable[..., tuple[Path, object]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bundle = tiny_bundle("plain", model_type="transformer", num_hidden_layers=2, eos_token_id=3)[0]
    options = [
        "--rounds",
        "1",
        "--steps",
        "2",
        "--batch",
        "2",
        "--threads",
        "1",
        "--prompt-tokens",
        "3",
        "--passes",
        "2",
    ]
    output = tmp_path / "bench.json"
    assert main(["bench", str(bundle), *options, "--position", "1", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "is not validated: its agreement with PyTorch was never shown" in text
    assert "takes no prompt with passes=2" in text
    document = json.loads(output.read_text(encoding="utf-8"))
    (candidate,) = document["candidates"]
    assert candidate["step"][0]["batch"] == 2
    assert [row["method"] for row in candidate["prefill"]] == ["default"]
    assert document["ratios"] == []


def test_a_baseline_that_cannot_run_is_not_run_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A module of this name that cannot be imported is first on the workers' path.
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    options = _changed(QUICK, against=("pytorch-dynamic-int8",), positions=(2,), prompt_tokens=(3,), rounds=1)
    found = run_bench(GOLDEN, options).candidate("pytorch-dynamic-int8")
    assert (found.status, found.step, found.load) == ("not run", (), None)
    assert "no torch here" in found.reason


@pytest.mark.evidence
def test_compiled_and_quantised_pytorch_run_where_there_is_a_compiler() -> None:
    names = ("pytorch-compile", "pytorch-dynamic-int8")
    report = run_bench(GOLDEN, _changed(QUICK, against=names))
    for name in names:
        candidate = report.candidate(name)
        assert candidate.status == "measured", candidate.reason
        assert len(candidate.step) == 2
    assert report.candidate("pytorch-compile").prefill == ()
    assert any("only the step is compiled" in note for note in report.notes)
