"""Long run: the rule of the chained windows, the growth and its interval, and faults that show late or grow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fault_bundle import SpoiledBundle
from fault_edits import Edit, constant, node, replace_output, replace_value
from faults_of_graphs import ROPE
from loose_runner import loose_runner
from short_setup import check_of, short_setup

from crt_export.bundle import open_bundle
from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.errors import InputError
from crt_export.graph.export import export_graph
from crt_export.graph.weights import write_graph, write_weights
from crt_export.models.base import LanguageModel
from crt_export.parity import ParityCase, ParityOptions, check_parity, load_tolerances
from crt_export.parity.check import case_from_manifest
from crt_export.parity.long_run import check_long_run, growth_checks, why_not_gated
from crt_export.parity.long_run.figures import Growth, growth_from_units
from crt_export.parity.long_run.run import layers_of_tensors
from crt_export.parity.long_run.schedule import CHAINED, SINGLE, Schedule, long_reference, schedules
from crt_export.parity.reference import STEP
from crt_export.parity.report import LevelResult
from crt_export.parity.setup import ParitySetup
from crt_export.text import TokenText

#: The fewest tokens whose growth is gated.
TOKENS, WINDOW, POSITIONS = 12_000, 32, 64


def _setup(
    checkpoint: Checkpoint, text: TokenText, tokens: int = TOKENS, model: LanguageModel | None = None
) -> ParitySetup:
    options = ParityOptions(
        validation_tokens=64, window=32, long_run_tokens=tokens, short_reason="tiny models", threads=1
    )
    return short_setup(checkpoint, text, options, model=model)


def _case(checkpoint: Checkpoint, step: Path, **changes: Any) -> ParityCase:
    """A target of one loose file."""
    graphs = {"step": step}
    values: dict[str, Any] = {
        "target": "ort-cpu-fp32", "runtime": "onnxruntime", "precision": "fp32", "unroll": 2,
        "cache_dtype": "float32", "graphs": graphs,
        "opener": lambda threads: loose_runner(graphs, checkpoint.config, "fp32", unroll=2),
    }  # fmt: skip
    return ParityCase(**{**values, **changes})


@pytest.fixture(scope="module")
def setup(parity_checkpoint: Checkpoint, real_text: TokenText) -> ParitySetup:
    return _setup(parity_checkpoint, real_text)


@pytest.fixture(scope="module")
def sound(setup: ParitySetup, parity_bundle: Path) -> LevelResult:
    return check_long_run(case_from_manifest(open_bundle(parity_bundle), "ort-cpu-fp32"), setup)


@pytest.fixture
def spoiled(setup: ParitySetup, parity_bundle: Path, tmp_path: Path) -> Callable[[Edit], LevelResult]:
    """``spoiled(edit)``: the level on a copy of the bundle, the one graph of whose target was edited."""

    def run(edit: Edit) -> LevelResult:
        copy = SpoiledBundle(parity_bundle, tmp_path / "bundle", "ort-cpu-fp32")
        copy.edit(["prefill_pass"], edit)
        return check_long_run(copy.case(), setup)

    return run


def _run(result: LevelResult, kind: str) -> dict[str, Any]:
    return next(run for run in result.to_dict()["data"]["runs"] if run["kind"] == kind)


# --- a sound target
def test_a_sound_target_passes_both_runs(sound: LevelResult) -> None:
    assert sound.passed, sound.failures
    single, chained = _run(sound, "single"), _run(sound, "chained")
    assert (single["tokens"], single["window"], chained["tokens"], chained["window"]) == (64, None, TOKENS, WINDOW)
    assert [(b["start"], b["stop"], b["gated"]) for b in single["blocks"]] == [
        (0, 4, True), (4, 8, True), (8, 16, True), (16, 32, True), (32, 64, False),
    ]  # fmt: skip
    assert [(b["start"], b["stop"]) for b in chained["blocks"]] == [(n, n + 1000) for n in range(0, TOKENS, 1000)]
    assert all(block["gated"] and 0 < block["relative_error"] < 1e-5 for block in chained["blocks"])
    assert all(abs(b["state_norm"] / b["reference_state_norm"] - 1) < 1e-5 for b in chained["blocks"])
    growth = chained["growth"]
    assert growth["gated"]
    assert growth["ci"][0] < growth["per_1000_tokens"] < growth["ci"][1] <= growth["limit"]
    assert growth["over_run_ci"][0] < growth["over_run"] < growth["over_run_ci"][1] <= growth["over_run_limit"]
    gate, rate = check_of(sound, "chained: growth"), check_of(sound, "chained: growth per 1,000 tokens")
    assert (gate.value, gate.limit, gate.passed) == (growth["over_run"], growth["over_run_limit"], True)
    assert (rate.value, rate.interval, rate.passed) == (growth["per_1000_tokens"], tuple(growth["ci"]), None)
    assert any("64 of 12,000 tokens, max_position_embeddings of the model is 64" in note for note in sound.notes)


def test_chained_windows_are_one_recurrence_with_an_emptied_cache(setup: ParitySetup, sound: LevelResult) -> None:
    """The documented rule, written out: position 0, nothing cached, h of the token before."""
    model, ids = setup.model, torch.from_numpy(setup.text.ids[None, : 3 * WINDOW])
    states, expected = model.start(1).states, []
    for start in range(0, 3 * WINDOW, WINDOW):
        state = dataclasses.replace(model.start(1), states=states)
        for t in range(start, start + WINDOW):
            h, state = model.step(ids[:, t : t + 1], state)
            expected.append(h[0, 0])
        states = state.states
    _, chained = schedules(_case(setup.checkpoint, Path("step")), setup.config, TOKENS)[0]
    found = long_reference(setup, chained).hidden(STEP, 1)[0, : 3 * WINDOW]
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)
    assert not torch.allclose(found[WINDOW], model.sequential(ids[:, WINDOW : WINDOW + 1])[0].hidden[0, 0], atol=1e-3)


def test_the_reference_is_computed_once_and_serves_shorter_runs(setup: ParitySetup, sound: LevelResult) -> None:
    single, _ = schedules(_case(setup.checkpoint, Path("step")), setup.config, TOKENS)[0]
    short, _ = schedules(_case(setup.checkpoint, Path("step"), capacity=40), setup.config, TOKENS)[0]
    whole, part = long_reference(setup, single), long_reference(setup, short)
    assert long_reference(setup, single) is whole
    assert (whole.windows.length, part.windows.length) == (64, 40)
    assert torch.equal(part.hidden(STEP, 1), whole.hidden(STEP, 1)[:, :40])


def test_text_that_is_too_short_says_what_is_needed(parity_checkpoint: Checkpoint, real_text: TokenText) -> None:
    text = TokenText(ids=real_text.ids[:2000], source="short.txt")
    with pytest.raises(InputError, match=r"short\.txt: 2,000 held-out tokens .* at least 2,001 tokens"):
        check_long_run(_case(parity_checkpoint, Path("step")), _setup(parity_checkpoint, text, 2000))


def test_a_text_too_short_for_the_last_level_is_found_before_the_first(
    parity_checkpoint: Checkpoint, parity_bundle: Path, real_text: TokenText
) -> None:
    """Levels before it may take many minutes, and their results would be lost."""
    ran: list[str] = []
    options = ParityOptions(
        levels=("contract", "long-run"), long_run_tokens=2000, validation_tokens=64, window=32, short_reason="tiny"
    )
    with pytest.raises(InputError, match="at least 2,001 tokens"):
        check_parity(
            parity_checkpoint,
            [_case(parity_checkpoint, parity_bundle / "graphs" / "step.fp32.onnx")],
            TokenText(ids=real_text.ids[:2000], source="short.txt"),
            options=options,
            progress=lambda stage, done, total: ran.append(stage),
        )
    assert ran == []


def test_growth_that_cannot_be_given_is_a_check_without_a_verdict() -> None:
    run = Schedule(kind=CHAINED, tokens=7, capacity=7, unit=1, window=7, trained=None)
    growth = growth_from_units(np.ones(7), run.unit)
    (check,) = growth_checks(run, growth, None, "fp32")
    assert (check.name, check.value, check.passed) == ("chained: growth", None, None)
    assert why_not_gated(run, growth, stateful=True) == "it cannot be given, 7 tokens are too few for 8 observations"


# --- faults in the file
def test_a_state_scaled_by_one_in_two_thousand_is_a_wrong_norm(spoiled: Callable[[Edit], LevelResult]) -> None:
    result = spoiled(
        replace_output(
            "next_state", constant("gain", 1.0005, np.float32), node("Mul", ["before", "gain"], "next_state")
        )
    )
    check = check_of(result, "chained: state norm")
    assert check.passed is False
    assert check.value == pytest.approx(math.log(1.0005), rel=0.2)
    assert "in tokens" in check.failures[0]


def test_an_error_that_accumulates_is_growth(spoiled: Callable[[Edit], LevelResult]) -> None:
    """One channel of the state counts the tokens in its high digits: right at first, then digit by digit is lost."""
    first = np.zeros(16, np.float32)
    first[0] = 64

    def edit(model: onnx.ModelProto) -> None:
        replace_value(
            "state",
            constant("round.to.64", 1.5 * 2**29, np.float32),  # float32 steps of 64 there
            constant("channel", first / 64, np.float32),
            node("Add", ["state", "round.to.64"], "state.rounded"),
            node("Sub", ["state.rounded", "round.to.64"], "state.high"),
            node("Mul", ["state.high", "channel"], "state.counted"),
            node("Sub", ["state", "state.counted"], "state.clean"),
            result="state.clean",
        )(model)
        replace_output(
            "next_state",
            constant("one.more", first, np.float32),
            node("Add", ["state.counted", "one.more"], "state.next.count"),
            node("Add", ["before", "state.next.count"], "next_state"),
        )(model)

    result = spoiled(edit)
    check = check_of(result, "chained: growth")
    assert check.passed is False
    assert check.value == pytest.approx(2, abs=0.3)  # a straight line that began at nothing
    assert "in units of 32; its upper end is expected to be at most 0.5 (fp32.growth)" in check.failures[0]


def _only_time(ids: np.ndarray, after: int) -> int:
    """A step whose pair of position and token occurs nowhere else in the chained run."""
    pairs = ids[:TOKENS] + 1000 * (np.arange(TOKENS) % WINDOW)
    values, counts = np.unique(pairs, return_counts=True)
    unique = np.flatnonzero(np.isin(pairs, values[counts == 1]))
    return int(unique[unique >= after][0])


@pytest.mark.parametrize("tensor", ["logits", "next_state"])
def test_nan_at_one_late_step_is_named(spoiled: Callable[[Edit], LevelResult], setup: ParitySetup, tensor: str) -> None:
    step = _only_time(setup.text.ids, 3000)
    axes = [1, 2] if tensor == "next_state" else [1]
    result = spoiled(_nan_once(tensor, step % WINDOW, int(setup.text.ids[step]), axes))
    check = check_of(result, "chained: NaN and infinity")
    assert check.passed is False
    assert check.failures == (f"first at step {step} (position {step % WINDOW}), tensor {tensor}",)
    if tensor == "logits":
        assert check.value == 1
        assert _run(result, "chained")["blocks"][3]["nll"] is None
        assert _run(result, "chained")["blocks"][2]["nll"] is not None


def _nan_once(tensor: str, position: int, token: int, axes: Sequence[int]) -> Edit:
    return replace_output(
        tensor,
        constant("at.position", position),
        constant("at.token", token),
        constant("at.column", [1]),
        constant("at.axes", axes),
        constant("at.nan", np.nan, np.float32),
        node("Equal", ["position", "at.position"], "at.row"),
        node("Squeeze", ["input_ids", "at.column"], "at.ids"),
        node("Equal", ["at.ids", "at.token"], "at.same"),
        node("And", ["at.row", "at.same"], "at.both"),
        node("Unsqueeze", ["at.both", "at.axes"], "at.mask"),
        node("Where", ["at.mask", "at.nan", "before"], tensor),
    )


def test_a_graph_that_stops_is_a_failed_run_with_its_step(
    setup: ParitySetup, parity_bundle: Path, tmp_path: Path
) -> None:
    copy = SpoiledBundle(parity_bundle, tmp_path / "bundle", "ort-cpu-fp32")
    for table in ROPE:
        copy.set_weight_of("prefill_pass", table, copy.weight(table)[:20])
    result = check_long_run(copy.case(), setup)
    assert [check.name for check in result.checks] == ["single: runs", "chained: runs"]
    assert result.passed is False
    assert "step 20 at position 20: ONNX Runtime failed in prefill_pass.fp32.onnx" in result.failures[0]


# --- other models
@pytest.mark.evidence  # exports one more model
def test_a_full_cache_slides_where_the_model_has_an_attention_window(
    tiny_bundle: Callable[..., tuple[Path, LanguageModel]], tiny_checkpoint: Path, real_text: TokenText
) -> None:
    """The single run goes past the 64 positions of the model; PyTorch counts on with longer tables."""
    bundle, model = tiny_bundle("windowed", num_hidden_layers=2, unroll_steps=2, sliding_window=6)
    checkpoint = dataclasses.replace(load_checkpoint(tiny_checkpoint), config=model.config)
    setup = _setup(checkpoint, real_text, 2000, model)
    result = check_long_run(_case(checkpoint, bundle / "graphs" / "step.fp32.onnx"), setup)
    assert result.passed, result.failures
    single, chained = _run(result, "single"), _run(result, "chained")
    assert (single["tokens"], single["capacity"], chained["window"]) == (2000, 64, 32)
    assert all(block["relative_error"] < 1e-5 for block in single["blocks"])
    assert any("slide rule" in note for note in result.notes)
    assert model.get_buffer("rope_cos").shape[0] == 64
    # Too few tokens for an interval worth gating.
    assert chained["growth"]["gated"] is False
    assert check_of(result, "chained: growth").passed is None
    assert any("growth of the chained run is not gated: 2,000 tokens, it takes 12,000" in n for n in result.notes)


@pytest.mark.evidence
def test_a_plain_transformer_has_no_state_to_judge(
    make_checkpoint: Callable[..., Path], real_text: TokenText, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(
        make_checkpoint(
            model_type="transformer", num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=48, training_sequence_length=None, rope_layout="half",
        )
    )  # fmt: skip
    setup = _setup(checkpoint, real_text)
    graph = export_graph(setup.model, "step")
    write_graph(graph, tmp_path / "step.onnx", write_weights({"step": graph}, tmp_path / "fp32.weights"))
    result = check_long_run(_case(checkpoint, tmp_path / "step.onnx"), setup)
    assert result.passed, result.failures
    single, chained = _run(result, "single"), _run(result, "chained")
    assert (single["tokens"], chained["tokens"], chained["window"]) == (48, TOKENS, 48)
    assert chained["blocks"][0]["state_norm"] is None
    assert not any("state norm" in check.name for check in result.checks)
    assert chained["growth"]["gated"] is False
    assert check_of(result, "chained: growth").passed is None
    assert any("growth of the chained run is not gated: no state is carried over" in note for note in result.notes)
    assert any("training length is not known" in note for note in result.notes)


def test_layers_follow_the_weights(parity_bundle: Path) -> None:
    step = parity_bundle / "graphs" / "step.fp32.onnx"
    nodes = onnx.load(step, load_external_data=False).graph.node
    attention = next(item for item in nodes if item.op_type == "Attention")
    layers = layers_of_tensors(
        step, [*(name for item in nodes for name in item.output), f"{attention.name} (bound of its scores)"]
    )
    assert set(layers.values()) >= {"positions", "embed", "correction", "layers.0", "layers.1", "final_norm", "lm_head"}
    assert layers["logits"] == "lm_head"
    assert layers["next_state"] == "layers.1"
    assert layers["present_key_values.0.key"] == "layers.0"
    assert layers[f"{attention.name} (bound of its scores)"] == "layers.0"
    assert list(dict.fromkeys(layers.values()))[-2:] == ["final_norm", "lm_head"]


# --- schedule and growth
def test_no_block_lies_on_both_sides_of_the_training_length() -> None:
    run = Schedule(kind=SINGLE, tokens=20_480, capacity=20_480, unit=128, trained=128)
    edges = [part.start for part in run.blocks]
    assert edges[:7] == [0, 16, 32, 64, 128, 1000, 2000]
    assert (run.blocks[-1].start, run.blocks[-1].stop, run.gated_tokens) == (20_000, 20_480, 128)


def _made_growth(times: float, error: float, tokens: int = 20_480) -> Growth:
    """An error that ends at so many times what it began with, and noise of a tenth from unit to unit."""
    noise = 1 + 0.1 * np.random.default_rng(3).standard_normal(tokens // 128)
    found = growth_from_units(error * np.linspace(1, times, tokens // 128) * noise, 128)
    assert found is not None
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8", "w8a8"])
def test_an_error_that_doubles_over_the_run_is_growth_at_every_precision(precision: str) -> None:
    """It stays far below relative_logit_error, from a hundredth of which it may begin."""
    tolerances, run = load_tolerances(), Schedule(kind=CHAINED, tokens=20_480, capacity=128, unit=128, trained=128)
    limits = tolerances.precisions[precision]
    for error in (limits.relative_logit_error / 100, limits.relative_logit_error / 4):
        verdicts = [
            growth_checks(run, _made_growth(times, error), limits.growth, precision)[0].passed
            for times in (0.7, 1, 1.3, 2, 3, 20)
        ]
        assert verdicts == [True, True, True, False, False, False]


def test_the_growth_of_a_plain_transformer_is_not_gated() -> None:
    run = Schedule(kind=CHAINED, tokens=20_480, capacity=128, unit=128, trained=128)
    growth = _made_growth(1, 1e-7)
    assert why_not_gated(run, growth, stateful=True) == ""
    assert "windows are independent" in why_not_gated(run, growth, stateful=False)


@pytest.mark.parametrize(("trained", "window", "unit"), [(128, 128, 128), (2561, 2561, 640), (8192, 8192, 640)])
def test_long_windows_are_cut_so_that_growth_can_be_told(
    parity_checkpoint: Checkpoint, trained: int, window: int, unit: int
) -> None:
    config = dataclasses.replace(
        parity_checkpoint.config, training_sequence_length=trained, max_position_embeddings=8192
    )
    _, chained = schedules(_case(parity_checkpoint, Path("step")), config, 20_480)[0]
    assert (chained.window, chained.unit) == (window, unit)
    growth = growth_from_units(np.ones(chained.tokens // chained.unit), chained.unit)
    assert growth is not None
    assert why_not_gated(chained, growth, stateful=True) == ""
