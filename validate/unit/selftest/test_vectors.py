"""The vectors: what is in them, that they are the same each time, and which files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crt_export.bundle import open_bundle
from crt_export.checkpoint import load_checkpoint
from crt_export.errors import BuildError, BundleError
from crt_export.models.declaration import HIDDEN
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity.tolerances import load_tolerances
from crt_export.profile import DimRange, EngineProfile, load_profile
from crt_export.runtime.opening import model_from_manifest
from crt_export.runtime.tensor_file import read_tensor_file
from crt_export.selftest.vectors import RECURRENCE, VECTORS, VECTORS_FILE, Vectors, load_vectors
from crt_export.stages.vectors import make_vectors, write_vectors
from crt_export.text import TokenText
from crt_export.tokenizer import load_tokenizer


def profiles(capacity: int = 64, unroll: int = 4) -> list[EngineProfile]:
    return [load_profile("ort-cpu-fp32").with_capacity(capacity).with_unroll(unroll)]


def made(folder: Path, *, text: TokenText | None = None, targets: list[EngineProfile] | None = None) -> Vectors:
    checkpoint = load_checkpoint(folder)
    tokenizer = load_tokenizer(folder, checkpoint.config)
    return make_vectors(checkpoint, tokenizer, targets or profiles(), text)


def test_they_are_what_pytorch_computes_token_by_token(tiny_checkpoint: Path) -> None:
    vectors = made(tiny_checkpoint)
    model = model_from_checkpoint(load_checkpoint(tiny_checkpoint))
    ids = torch.from_numpy(vectors.input_ids)[None]
    hidden, state = torch.zeros(0), model.start(1)
    for token in range(vectors.prompt):
        hidden, state = model.step(ids[:, token : token + 1], state)
    for index in range(vectors.steps + 1):
        logits = model.head(hidden)[0, 0].numpy()
        found = vectors.tensors[f"{RECURRENCE}.logits.{index}"]
        np.testing.assert_allclose(found, logits[vectors.columns(index)], rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            vectors.tensors[f"{RECURRENCE}.state"][index], state.states[HIDDEN][0, 0].numpy(), rtol=0, atol=1e-5
        )
        assert vectors.tensors[f"{RECURRENCE}.next_tokens"][index] == logits.argmax()
        if index < vectors.steps:
            token = vectors.prompt + index
            hidden, state = model.step(ids[:, token : token + 1], state)


def test_passes_give_another_function_than_the_recurrence(tiny_checkpoint: Path) -> None:
    vectors = made(tiny_checkpoint, targets=[*profiles(unroll=1), *profiles(unroll=4)])
    assert vectors.runs == ("prefill.k1.chunk12", "prefill.k4.chunk12", RECURRENCE)
    states = [vectors.tensors[f"{run}.state"][0] for run in vectors.runs]
    assert np.abs(states[0] - states[2]).max() > np.abs(states[1] - states[2]).max() > 0


def test_equal_inputs_give_equal_bytes(tiny_checkpoint: Path) -> None:
    assert made(tiny_checkpoint).to_bytes() == made(tiny_checkpoint).to_bytes()


def test_the_metadata_say_where_the_tokens_are_from(
    tiny_checkpoint: Path, make_checkpoint: Callable[..., Path]
) -> None:
    text = TokenText(ids=np.arange(100, 200), source="held-out")
    validated, packaged = made(tiny_checkpoint, text=text), made(tiny_checkpoint)
    assert (validated.metadata["ids"], validated.metadata["seed"]) == ("validation text", "")
    np.testing.assert_array_equal(validated.input_ids, text.ids[:28])
    assert packaged.metadata["ids"] == "packaged text"
    without = made(make_checkpoint(tokenizer="none", vocab_size=5))
    assert (without.metadata["ids"], without.metadata["seed"]) == ("random", "0")
    assert without.input_ids.max() < 5


def test_the_limits_are_those_of_the_tolerances(tiny_checkpoint: Path) -> None:
    limits = {name: tolerance.selftest_error for name, tolerance in load_tolerances().precisions.items()}
    assert made(tiny_checkpoint).limits == limits


@pytest.mark.parametrize(
    ("capacity", "prompt", "steps"), [(64, 12, 16), (28, 12, 16), (14, 6, 8), (2, 1, 1), (1, 1, 0)]
)
def test_short_capacities_shrink_prompt_and_steps(
    tiny_checkpoint: Path, capacity: int, prompt: int, steps: int
) -> None:
    vectors = made(tiny_checkpoint, targets=profiles(capacity))
    assert (vectors.prompt, vectors.steps) == (prompt, steps)
    assert vectors.tensors[f"{RECURRENCE}.past_key_values.0.key"].shape == (4, prompt + steps, 8)


def test_a_chunk_below_the_prompt_is_a_run_of_its_own(tiny_checkpoint: Path) -> None:
    import dataclasses

    (whole,) = profiles()
    chunked = dataclasses.replace(whole, name="chunked", seq=DimRange(1, 5, 5))
    vectors = made(tiny_checkpoint, targets=[whole, chunked])
    a, b = (vectors.tensors[f"prefill.k4.chunk{chunk}.state"][0] for chunk in (5, 12))
    assert np.abs(a - b).max() > 0


def test_a_large_vocabulary_is_covered_over_the_steps(make_checkpoint: Callable[..., Path]) -> None:
    vectors = made(make_checkpoint(vocab_size=9000, tokenizer="none", num_hidden_layers=1))
    columns = [np.arange(9000)[vectors.columns(index)] for index in range(vectors.steps + 1)]
    assert len(columns[0]) == len(columns[-1]) == 9000
    assert all(len(some) == 3000 for some in columns[1:-1])
    assert np.unique(np.concatenate(columns[1:4])).size == 9000


def test_values_that_are_not_finite_are_a_failed_build(make_checkpoint: Callable[..., Path]) -> None:
    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["final_norm.weight"][:] = 3e38

    with pytest.raises(BuildError, match=r"(?s)not finite for the packaged text .*recurrence.logits.0"):
        made(make_checkpoint(edit=overflow))


def test_the_plain_transformer_has_no_state(tiny_transformer_checkpoint: Path) -> None:
    vectors = made(tiny_transformer_checkpoint, targets=profiles(unroll=1))
    assert not [name for name in vectors.tensors if name.endswith(".state")]
    for index in range(vectors.steps + 1):
        np.testing.assert_allclose(
            *(vectors.tensors[f"{run}.logits.{index}"] for run in vectors.runs), rtol=0, atol=1e-5
        )


# --- files that are refused
def read(bundle: Path) -> Vectors:
    files = open_bundle(bundle, allow_unvalidated=True)
    return load_vectors(files.file(VECTORS_FILE), model_from_manifest(files), files.manifest["checkpoint"]["sha256"])


def test_a_written_file_reads_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    tokenizer = load_tokenizer(tiny_checkpoint, checkpoint.config)
    file = write_vectors(checkpoint, tokenizer, profiles(), None, None, tmp_path)
    assert file == tmp_path / VECTORS_FILE
    found = load_vectors(file, checkpoint.config.info, checkpoint.sha256)
    assert found.to_bytes() == file.read_bytes()
    assert found.metadata["generator"].startswith("crt-export ")


FAULTS: dict[str, tuple[Callable[[dict[str, str], dict[str, Any]], object], str]] = {
    "other checkpoint": (lambda m, t: m.update(checkpoint="f" * 64), "made of the checkpoint ffffffffffffffff, the b"),
    "no prompt": (lambda m, t: m.update(prompt="0"), "metadata prompt must be a whole number of at least 1, found '0'"),
    "absurd steps": (lambda m, t: m.update(steps="999999999"), "metadata steps is 999999999, but the file has"),
    "limits": (lambda m, t: m.update(limits='{"fp32": -1}'), "limits must be a JSON object of numbers above 0"),
    "not JSON": (lambda m, t: m.update(limits="{"), "limits must be a JSON object"),
    "NaN": (lambda m, t: t["recurrence.state"].__setitem__((3, 0), np.nan), "recurrence.state is not finite"),
    "missing": (lambda m, t: t.pop("recurrence.logits.4"), "recurrence.logits.4 is missing"),
    "unknown": (lambda m, t: t.update(extra=np.zeros(1, np.float32)), "extra is unknown"),
    "shape": (
        lambda m, t: t.update({"recurrence.margins": np.zeros(3, np.float32)}),
        r"recurrence.margins must be float32 \[17\], found float32 \[3\]",
    ),
    "token": (lambda m, t: t["input_ids"].__setitem__(0, 256), "input_ids holds tokens outside the vocabulary"),
    "no recurrence": (
        lambda m, t: [t.pop(name) for name in list(t) if name.startswith("recurrence.")],
        "they hold no run 'recurrence'",
    ),
    "divisor": (
        lambda m, t: t.update({"value_divisors.w8a8.0": np.zeros((4, 8), np.float32)}),
        "value_divisors.w8a8.0 must be above 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_vectors_are_refused_with_what_is_wrong(edit_vectors: Any, fault: str) -> None:
    edit, message = FAULTS[fault]
    with pytest.raises(BundleError, match=message):
        read(edit_vectors(edit))


def rewritten(bundle: Path, old: bytes, new: bytes) -> None:
    file = bundle / VECTORS_FILE
    content = file.read_bytes()
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"format_version":"1"', b'"format_version":"2"', "format version 2; this version reads up to 1: upgrade"),
        (b'"format_version":"1"', b'"format_version":"x"', "its format version is 'x'"),
        (b"crt-export selftest vectors", b"crt-export selftest nothing", "is not a file of self-test vectors"),
        (b'"torch":', b'"trch":', "its metadata lack torch"),
    ],
)
def test_another_format_is_refused(copy: Path, sign_again: Any, old: bytes, new: bytes, message: str) -> None:
    new += b" " * 0
    rewritten(copy, old, new)
    if len(new) != len(old):
        content = (copy / VECTORS_FILE).read_bytes()
        size = int.from_bytes(content[:8], "little") + len(new) - len(old)
        (copy / VECTORS_FILE).write_bytes(size.to_bytes(8, "little") + content[8:])
    sign_again(copy)
    with pytest.raises(BundleError, match=message):
        read(copy)


@pytest.mark.parametrize("cut", [0, 7, 500, -1])
def test_a_truncated_file_is_refused(copy: Path, sign_again: Any, cut: int) -> None:
    file = copy / VECTORS_FILE
    file.write_bytes(file.read_bytes()[:cut])
    sign_again(copy)
    with pytest.raises(BundleError, match="is not a file of self-test vectors or damaged"):
        read(copy)


def test_a_changed_byte_is_refused_before_it_is_read_and_after(copy: Path, sign_again: Any) -> None:
    file = copy / VECTORS_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"has SHA-256 .*, the manifest says"):
        read(copy)
    sign_again(copy)
    with pytest.raises(BundleError, match="is damaged: its tensors have SHA-256"):
        read(copy)


def test_metadata_are_strings_that_other_readers_find(tiny: Path) -> None:
    metadata, _ = read_tensor_file(VECTORS, tiny / VECTORS_FILE)
    assert set(metadata) == {*VECTORS.required, "format", "format_version", "sha256"}
    assert json.loads(metadata["limits"]).keys() == {"fp32", "fp16", "w8", "w8a8"}
