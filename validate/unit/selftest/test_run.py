"""The self-test passes where the machine computes what PyTorch computed, and names what is off where it does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.errors import BundleError, InputError, MissingDependencyError
from crt_export.runtime import Session
from crt_export.selftest import SelftestReport, TargetResult, run_selftest
from crt_export.selftest.replay import Comparison, Observed
from crt_export.selftest.results import junit_cases
from crt_export.selftest.vectors import VECTORS_FILE, Vectors

TARGET = "ort-cpu-fp32"


def failures(bundle: Path, target: str = TARGET) -> str:
    report = run_selftest(bundle, [target])
    assert report.exit_code == 1
    assert not report.passed
    return "\n".join(report.failures)


def test_a_sound_target_passes_every_replay_with_small_errors(tiny: Path) -> None:
    report = run_selftest(tiny, [TARGET, "chunked"])
    assert report.passed
    assert [target.status for target in report.targets] == ["passed", "passed"]
    for target in report.targets:
        assert [replay.replay for replay in target.replays] == ["step", "prefill", "prefill_pass", "reset"]
        names = {"logits", "state", "past_key_values.0.key", "past_key_values.0.value"}
        for replay in target.replays[:-1]:
            assert {tensor.tensor for tensor in replay.tensors} == names
            assert max(tensor.largest for tensor in replay.tensors) < 5e-6


@pytest.mark.parametrize(
    ("name", "changes", "replays"),
    [
        (
            "plain",
            {"model_type": "transformer", "num_hidden_layers": 2, "eos_token_id": 3},
            ["step", "prefill", "reset"],
        ),
        ("windowed", {"num_hidden_layers": 2, "unroll_steps": 2, "sliding_window": 6}, None),
    ],
)
def test_other_models_pass(tiny_bundle: Any, name: str, changes: dict[str, Any], replays: list[str] | None) -> None:
    report = run_selftest(tiny_bundle(name, **changes)[0], [TARGET, "chunked"])
    assert report.failures == ()
    assert report.passed
    assert [replay.replay for replay in report.targets[0].replays] == (
        replays or ["step", "prefill", "prefill_pass", "reset"]
    )


def test_what_cannot_run_here_is_listed_and_fails_only_where_it_was_asked_for(tiny: Path) -> None:
    everything = run_selftest(tiny)
    by_name = {target.target: target for target in everything.targets}
    assert by_name["rtx-sm80-fp16"].status == "not run"
    assert by_name["rtx-sm80-fp16"].reason
    assert by_name["broken"].status == "failed"  # its caches are not what its manifest promises
    assert everything.exit_code == 1
    asked = run_selftest(tiny, [TARGET, "rtx-sm80-fp16"])
    assert (asked.passed, asked.exit_code) == (False, 3)
    cases = {(case.suite, case.name): case for case in junit_cases(asked)}
    assert cases["rtx-sm80-fp16 selftest", "open"].failures
    assert junit_cases(everything)[-2].skipped or by_name["rtx-sm80-fp16"].reason


def test_no_target_that_ran_is_no_pass(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise MissingDependencyError("onnxruntime is not installed")

    monkeypatch.setattr("crt_export.runtime.Bundle.session", absent)
    report = run_selftest(tiny)
    assert report.exit_code == 3
    assert {target.status for target in report.targets} == {"not run"}


@pytest.mark.parametrize("weight", ["lm_head.weight", "layers.0.mlp.down.weight"])
def test_a_changed_weight_is_named_where_it_shows(
    copy: Path, change_step_weight: Callable[..., None], weight: str
) -> None:
    change_step_weight(copy, weight, 1.01)
    found = failures(copy)
    assert f"{TARGET}, step: logits after the prompt of 12 tokens is off by" in found
    assert f"{TARGET}, prefill: logits after the prompt of 12 tokens is off by" in found
    assert "the limit is 2e-05" in found
    assert ("state after" in found) == (weight != "lm_head.weight")


def test_a_vector_off_in_one_place_is_named(edit_vectors: Any) -> None:
    def edit(_: dict[str, str], tensors: dict[str, np.ndarray]) -> None:
        tensors["recurrence.state"][5] += 0.5
        tensors["recurrence.past_key_values.0.value"][2, 9] += 0.5
        tensors["prefill.k3.chunk12.logits.7"][200] -= 3

    found = failures(edit_vectors(edit))
    assert "step: state after step 5 is off by" in found
    assert "step: past_key_values.0.value at position 9 is off by" in found
    assert "prefill: logits after step 7 is off by" in found
    assert found.count("\n") == 3  # and the cache of prefill_pass


def test_another_next_token_counts_where_it_leads_clearly(edit_vectors: Any) -> None:
    def edit(_: dict[str, str], tensors: dict[str, np.ndarray]) -> None:
        for index, margin in ((3, 1.0), (4, 1e-6)):
            token = tensors["recurrence.next_tokens"]
            token[index] = (token[index] + 1) % 256
            tensors["recurrence.margins"][index] = margin

    found = failures(edit_vectors(edit))
    assert "step: next_token after step 3 is" in found
    assert "whose logit leads by 1 (a lead of" in found
    assert "step 4" not in found


def test_state_that_survives_reset_is_seen(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "reset", lambda self: self._guard.decoder.position.__setitem__(0, 0))
    found = failures(tiny)
    assert "prefill: state after the prompt" in found or "prefill: logits after the prompt" in found


def test_other_bits_after_reset_are_seen(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    prefill = Session.prefill

    def drifting(self: Session, *arguments: Any, **options: Any) -> np.ndarray:
        calls.append(1)
        logits = prefill(self, *arguments, **options)
        return logits if len(calls) < 3 else np.nextafter(logits, np.float32(np.inf))

    monkeypatch.setattr(Session, "prefill", drifting)
    found = failures(tiny)
    assert "reset: logits after the prompt of 12 tokens differs by up to" in found
    assert "expected the same bits" in found


def test_a_step_that_gives_nan_is_a_failure_of_its_step(copy: Path, change_step_weight: Callable[..., None]) -> None:
    change_step_weight(copy, "lm_head.bias", float("nan"))
    found = failures(copy)
    assert f"{TARGET}, step: failed at the prompt" in found
    assert f"{TARGET}: logits is not finite" in found


def test_bundles_without_vectors_or_with_changed_files_are_refused(copy: Path, sign_again: Any) -> None:
    weights = copy / "graphs" / "fp32.weights"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="has SHA-256"):
        run_selftest(copy, [TARGET])
    (copy / VECTORS_FILE).unlink()
    with pytest.raises(BundleError, match="missing"):
        run_selftest(copy)
    (copy / "selftest").rmdir()
    sign_again(copy)
    with pytest.raises(BundleError, match=r"has no selftest/vectors.safetensors; build it again with 'crt-export"):
        run_selftest(copy)


def test_unknown_targets_and_runs_are_refused(tiny: Path, edit_manifest: Any) -> None:
    with pytest.raises(InputError, match=r"unknown target 'none': .* was built for ort-cpu-fp32, chunked"):
        run_selftest(tiny, ["none"])
    other = edit_manifest(lambda manifest: manifest["targets"][TARGET].update(unroll=7))
    with pytest.raises(BundleError, match=r"no run 'prefill.k7.chunk12' for ort-cpu-fp32, only prefill.k3"):
        run_selftest(other, [TARGET])


def test_values_that_a_precision_divides_are_compared_in_their_own_scale() -> None:
    values = np.arange(1, 7, dtype=np.float32).reshape(1, 3, 2)
    divisors = np.array([[4, 0.5]], np.float32)
    tensors = {"run.past_key_values.0.value": values, "value_divisors.w8a8.0": divisors}
    vectors = Vectors(metadata={"prompt": "3", "steps": "0", "logit_stride": "1"}, tensors=tensors)
    cache = (values / divisors[:, None]).astype(np.float16)

    def compared(precision: str, found: np.ndarray) -> tuple[str, ...]:
        comparison = Comparison(vectors=vectors, run="run", precision=precision, limit=1e-3)
        caches = {"past_key_values.0.value": found}
        comparison.add_caches(Observed(index=0, logits=np.zeros(1), next_token=0, states={}, caches=caches))
        return comparison.failures

    assert compared("w8a8", cache) == ()
    assert compared("fp16", cache)
    for other in (cache[:, :2], cache[:, :0], np.concatenate([cache, cache[:, :1]], axis=1)):
        count = other.shape[1]
        short = f"past_key_values.0.value after the prompt of 3 tokens holds {count} tokens, expected 3"
        assert compared("w8a8", other) == (short,)
    cache[0, 1, 1] = 20
    assert "at position 1 is off" in compared("w8a8", cache)[0]


@pytest.mark.parametrize(
    ("statuses", "asked", "code"),
    [
        (["passed", "not run"], (), 0),
        (["passed", "not run"], ("t1",), 3),
        (["passed", "not run"], ("t0",), 0),
        (["failed", "not run"], ("t1",), 1),
        (["not run"], (), 3),
        ([], (), 3),
    ],
)
def test_exit_codes(statuses: list[Any], asked: tuple[str, ...], code: int) -> None:
    targets = tuple(TargetResult(target=f"t{number}", status=status) for number, status in enumerate(statuses))
    report = SelftestReport(bundle="b", validated=True, vectors={}, targets=targets, asked=asked)
    assert report.exit_code == code
    assert report.to_dict()["passed"] is (code == 0)


def test_it_needs_neither_torch_nor_onnx(tiny: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "from crt_export.selftest import run_selftest\n"
        f"assert run_selftest({str(tiny)!r}, ['{TARGET}']).passed\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
