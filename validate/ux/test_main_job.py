"""From checkpoint to text on the command line: stdout, stderr, JSON and exit codes of every verb on bundles."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import save_file

from crt_export.bundle.manifest import sealed
from crt_export.parity import ParityReport
from crt_export.report.reading import read_report
from crt_export.runtime import GenerationOptions, SamplingOptions, generate_text, load_bundle

pytestmark = pytest.mark.slow

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# What users' own gates parse: more keys may come, none may go.
FIGURES = {"delta_nll", "max_abs_logit_error", "mean_kl", "top1_agreement"}


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def edit_weights(bundle: Path, keep_hash: bool) -> None:
    """Zero the last 4 KiB of the weights; without ``keep_hash`` the manifest is made to fit again."""
    weights = bundle / "graphs" / "fp32.weights"
    content = bytearray(weights.read_bytes())
    content[-4096:] = bytes(4096)
    weights.write_bytes(content)
    if not keep_hash:
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        manifest["files"]["graphs/fp32.weights"]["sha256"] = hashlib.sha256(content).hexdigest()
        (bundle / "manifest.json").write_text(json.dumps(sealed(manifest)), encoding="utf-8")


def test_build_json_is_one_document_and_progress_goes_to_stderr(
    bundle: Path, main_job: subprocess.CompletedProcess[str]
) -> None:
    document = json.loads(main_job.stdout)
    assert Path(document["path"]) == bundle.resolve()
    assert document["validated"] is True
    assert {"ort-cpu-fp32", "ort-cpu-int8"} <= set(document["targets"])
    assert document["targets"]["ort-cpu-fp32"]["capacity"] == 300
    assert "built in" in main_job.stderr
    assert "Traceback" not in main_job.stderr


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_engines_are_compiled_listed_and_never_passed(bundle: Path) -> None:
    """Also: what TensorRT compiles is what was compared, and every linear is quantised in every graph."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    linears = 2 + 6 + 1
    counts = {
        (entry["graph"], entry["precision"]): entry["quantized_matmuls"]
        for entry in manifest["graphs"]
        if entry["precision"] in ("w8", "w8a8")
    }
    for precision in ("w8", "w8a8"):
        assert counts["step", precision] == counts["prefill_pass", precision] == linears
        assert counts["prefill", precision] == 2 * (linears - 1) + 1
        assert counts["head", precision] == 1
    for target in ("rtx-sm80-fp16", "rtx-sm80-int8"):
        entry = manifest["targets"][target]
        rows = [row for row in read_report(bundle).rows if row.target == target]
        compiled = [row for row in rows if row.status == "compiled"]
        assert {row.graph for row in compiled} == {"step", "prefill"} == set(entry["engines"])
        assert all(row.passed is None and row.nll is None for row in compiled)
        assert any(row.status == "run" and row.arithmetic == "fp32-emulated" and row.passed for row in rows)
        for graph, engine in entry["engines"].items():
            assert entry["graphs"][graph] == f"graphs/{graph}.{target}.onnx"
            assert (bundle / engine).stat().st_size > 1000
            sidecar = json.loads((bundle / engine).with_suffix(".json").read_text(encoding="utf-8"))
            assert (sidecar["compute_capability"], sidecar["capacity"]) == (80, 300)
            gemms = {name: n for name, n in sidecar["layers"].items() if name.startswith("gemm")}
            kind = "gemm int8 -> float32" if target.endswith("int8") else "gemm float16 -> float16"
            assert set(gemms) == {kind}


def test_every_graph_belongs_to_a_target_and_says_who_opens_it(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    of_targets = {file for target in manifest["targets"].values() for file in target["graphs"].values()}
    roles = {entry["file"]: entry["roles"] for entry in manifest["graphs"]}
    assert set(roles) == of_targets == {f"graphs/{path.name}" for path in (bundle / "graphs").glob("*.onnx")}
    expected = {
        "step": ["interchange"],
        "prefill": ["interchange"],
        "prefill_pass": ["session"],
        "head": ["validation"],
    }
    assert {name: roles[f"graphs/{name}.fp32.onnx"] for name in expected} == expected
    if "rtx-sm80-fp16" in manifest["targets"]:
        assert roles["graphs/step.rtx-sm80-fp16.onnx"] == ["compiler", "interchange"]
        assert roles["graphs/prefill_pass.rtx-sm80-fp16.onnx"] == ["validation"]


@pytest.mark.evidence  # each verb has a test of its own here, and test_readme.py parses every command
def test_every_other_readme_command_works(bundle: Path, readme_commands: list[list[str]], python_in: Run) -> None:
    """``doctor`` judges the machine; the long validation is the short one with another number."""
    folder = bundle.parent.parent
    _write_keys(bundle.parent / "private.pem", bundle.parent / "public.pem")
    _write_llama(bundle.parent / "hf-model")
    (folder / "validate" / "results").mkdir(parents=True, exist_ok=True)
    for command in readme_commands:
        if command[0] not in ("build", "doctor") and "--validation-tokens" not in command:
            result = python_in(folder, "-m", "crt_export", *command)
            assert result.returncode == 0, f"{command}: {result.stderr}"
            assert result.stdout or command[0] == "report"  # which writes a file


def _write_keys(private: Path, public: Path) -> None:
    """As docs/signing.md makes them with openssl."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem, hidden = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, hidden))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))


def _write_llama(folder: Path) -> None:
    """A Hugging Face folder as transformers saves one, of zeros."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    layer, shapes = "model.layers.0", {"model.embed_tokens": (64, 16), "model.norm": (16,)}
    shapes |= {f"{layer}.self_attn.{part}_proj": (16, 16) for part in "qkvo"}
    shapes |= {f"{layer}.mlp.{part}_proj": (24, 16) for part in ("gate", "up")}
    shapes |= {f"{layer}.{norm}_layernorm": (16,) for norm in ("input", "post_attention")}
    shapes[f"{layer}.mlp.down_proj"] = (16, 24)
    tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.evidence  # the failing validate below goes the same way, and a build writes the same rows
def test_validate_json_has_the_promised_rows(crt_export: Run, bundle: Path, heldout_text: Path) -> None:
    result = crt_export("validate", str(bundle), "--text", str(heldout_text), "--json")
    report = ParityReport.from_dict(json.loads(result.stdout))
    assert (result.returncode, report.passed) == (0, True)
    step = next(row for row in report.rows if row.target == "ort-cpu-fp32" and row.regime == "step")
    assert {check.metric for check in step.checks} >= FIGURES
    assert (step.status, step.passed) == ("run", True)
    assert step.tokens >= 4096


def test_validate_fails_with_exit_1_when_the_built_weights_differ(
    crt_export: Run, copy: Path, heldout_text: Path
) -> None:
    edit_weights(copy, keep_hash=False)
    result = crt_export("validate", str(copy), "--text", str(heldout_text), "--json")
    report = json.loads(result.stdout)
    assert (result.returncode, report["passed"]) == (1, False)
    assert any(row.passed is False for row in ParityReport.from_dict(report).rows)


def test_generate_streams_the_same_text_for_the_same_seed(crt_export: Run, bundle: Path) -> None:
    arguments = ("generate", str(bundle), "--prompt", "ab", "--max-new-tokens", "8", "--temperature", "1")
    first, again, other = (crt_export(*arguments, "--seed", seed) for seed in ("1", "1", "2"))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    assert first.stdout != other.stdout
    assert "8 tokens" in first.stderr
    options = GenerationOptions(max_new_tokens=8, sampling=SamplingOptions(temperature=1.0, seed=1))
    with load_bundle(bundle) as opened:
        generation = generate_text(opened, "ab", options)
        text = "".join(generation)
        ids = [*opened.tokenizer.encode_prompt("ab"), *generation.result.token_ids]
        assert "ab" + text == opened.tokenizer.decode(ids)
    assert first.stdout == text + "\n"
    assert first.stderr.startswith("ab["), "the prompt, then the figures"


def test_generate_ends_before_a_stop_string(crt_export: Run, bundle: Path) -> None:
    arguments = ("generate", str(bundle), "--prompt", "ab", "--max-new-tokens", "8", "--temperature", "1")
    more = ("--min-p", "0.001", "--repetition-penalty", "1.2", "--ignore-eos", "--passes", "2")
    free = crt_export(*arguments, *more)
    assert free.returncode == 0, free.stderr
    stop = free.stdout[2:4]
    found = crt_export(*arguments, *more, "--stop", "never there", "--stop", stop)
    assert found.stdout == free.stdout[: free.stdout.index(stop)] + "\n"
    assert f"ended by stop_string {stop!r}" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "empty prompt"),
        (("--prompt", "a", "--max-new-tokens", "300"), "exceeds the capacity of 300"),
        (("--prompt", "a", "--target", "ort-cpu-fp16"), "ort-cpu-fp16"),
    ],
)
def test_generate_refuses_what_it_cannot_do(
    crt_export: Run, bundle: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = crt_export("generate", str(bundle), *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr


def test_inspect_verifies_every_file(crt_export: Run, bundle: Path, copy: Path) -> None:
    document = json.loads(crt_export("inspect", str(bundle), "--verify", "--json").stdout)
    assert (document["kind"], document["verified"]) == ("bundle", True)
    assert document["contract"]["step"]["inputs"]
    edit_weights(copy, keep_hash=True)
    result = crt_export("inspect", str(copy), "--verify")
    assert result.returncode == 2
    assert "fp32.weights" in result.stderr


def test_inspect_shows_the_parity_summary(crt_export: Run, bundle: Path) -> None:
    result = crt_export("inspect", str(bundle))
    assert result.returncode == 0
    assert "validated" in result.stdout
    assert "step by step against PyTorch FP32" in result.stdout
    full = crt_export("inspect", str(bundle), "--full").stdout
    assert "agreement with PyTorch FP32" in full
    assert "regime-gap compares K passes" in full
    assert "\x1b" not in result.stdout


def test_build_for_an_unknown_target_writes_nothing(crt_export: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = crt_export("build", str(tiny_checkpoint), "--output", "out", "--target", "ort-cpu-fp23")
    assert (result.returncode, result.stdout) == (2, "")
    assert "did you mean ort-cpu-fp32?" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        ("SIGINT", 130, "interrupted"),
        # Signal, code and word are those of test_termination.py, and what is left behind that of the other.
        pytest.param("SIGTERM", 143, "terminated", marks=pytest.mark.evidence),
    ],
)
def test_interrupted_build_leaves_nothing_behind(
    number: str,
    code: int,
    word: str,
    environment: dict[str, str],
    tiny_checkpoint: Path,
    heldout_text: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cache, temporary = (tmp_path_factory.mktemp(name) for name in ("cache", "temporary"))
    # A finished build of the same checkpoint would have nothing left to export.
    environment = environment | {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "crt_export", "build", str(tiny_checkpoint), "--output", "out"]
    process = subprocess.Popen(
        [*command, "--target", "ort-cpu-fp32", "--text", str(heldout_text)],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stderr is not None
    with process.stderr as stream:
        for line in stream:
            if ": export" in line:
                process.send_signal(getattr(signal, number))
                break
        rest = stream.read()
    assert process.wait(timeout=120) == code, rest
    assert rest.splitlines()[-1] == word
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
    assert not list(temporary.glob("crt-export*"))  # torch leaves a folder of its own
    assert not [path for path in cache.rglob("*") if path.name.startswith(".unfinished")]
