"""The mutators: the same bytes for the same seed, every edit reached, and damage that gets past the hashes."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from crt_export.bundle import open_bundle
from crt_export.runtime import Snapshot

NUMBERS = range(40)


@pytest.fixture(scope="module")
def cases() -> Any:
    return importlib.import_module("cases")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    importlib.import_module("seeds").write_seeds(folder)
    return folder


KINDS = ("manifest", "onnx", "vectors", "snapshot", "safetensors", "sidecar", "profile", "tokenizer")


def digest(cases: Any, seeds: Path, kind: str, seed: int) -> str:
    result = hashlib.sha256()
    for number in NUMBERS:
        inputs = cases.inputs_of_case(cases.new_case(kind, seed, number), seeds)
        result.update(json.dumps(inputs.to_dict(), sort_keys=True).encode())
    return result.hexdigest()


def test_every_kind_of_the_issue_is_there(cases: Any) -> None:
    assert set(cases.KINDS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_inputs_always_and_another_seed_others(cases: Any, seeds: Path, kind: str) -> None:
    first = digest(cases, seeds, kind, 1)
    assert digest(cases, seeds, kind, 1) == first
    assert digest(cases, seeds, kind, 2) != first


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_differ_from_their_seed_and_from_one_another(cases: Any, seeds: Path, kind: str) -> None:
    found = set()
    unchanged = 0
    for number in NUMBERS:
        inputs = cases.inputs_of_case(cases.new_case(kind, 1, number), seeds)
        ((name, content),) = inputs.files.items()
        found.add((content.data, content.hole))
        if kind not in ("tokenizer", "profile"):  # those have several seeds
            unchanged += (content.data, content.hole) == ((seeds / name).read_bytes(), 0) and not inputs.signed
    assert unchanged <= len(NUMBERS) * 0.1  # a piece that is moved may fall onto its like
    assert len(found) > len(NUMBERS) * 0.8


def test_a_stored_input_is_read_back_as_it_was(cases: Any, seeds: Path) -> None:
    for number in NUMBERS:
        inputs = cases.inputs_of_case(cases.new_case("snapshot", 3, number), seeds)
        assert cases.Inputs.from_dict(json.loads(json.dumps(inputs.to_dict()))) == inputs


def test_a_smaller_case_makes_fewer_of_the_same_changes(cases: Any, seeds: Path) -> None:
    case = next(case for case in (cases.new_case("manifest", 1, n) for n in range(99)) if len(case.edits) == 3)
    smaller = cases.smaller_cases(case)
    assert [len(other.edits) for other in smaller] == [2, 2, 2]
    assert len({cases.inputs_of_case(other, seeds).files["bundle/manifest.json"] for other in smaller}) > 1


# --- what the mutators do to a format
def test_onnx_is_taken_apart_and_put_together_again(seeds: Path) -> None:
    onnx_edits = importlib.import_module("onnx_edits")
    content = (seeds / "bundle" / "graphs" / "step.fp32.onnx").read_bytes()
    assert onnx_edits.serialise(onnx_edits.parse(content)) == content
    changed = {onnx_edits.edit_onnx(content, Random(number)) for number in range(40)}
    assert any(b"../../" in graph for graph in changed)
    assert len(changed) > 35


def test_json_tokens_that_no_writer_writes(seeds: Path) -> None:
    json_edits = importlib.import_module("json_edits")
    content = (seeds / "bundle" / "manifest.json").read_bytes()
    texts = [json_edits.edit_json(content, Random(number)) for number in range(1500)]
    for token in (b"NaN", b"9223372036854775808", b"1e400", b"[" * 200, b"\\ud800", b"\x01", b"\x1b[31m"):
        assert any(token in text or json.dumps(token.decode())[1:-1].encode() in text for text in texts), token
    twice = 0
    for text in texts:
        try:
            json.loads(text, object_pairs_hook=lambda pairs: 1 // (len(dict(pairs)) == len(pairs)))
        except ZeroDivisionError:
            twice += 1
        except (ValueError, RecursionError):
            pass
    assert twice > 5


def test_tensor_files_of_every_sort(seeds: Path) -> None:
    edits = importlib.import_module("tensor_file_edits")
    content = (seeds / "session.snapshot").read_bytes()
    found = [edits.edit_tensor_file(content, Random(number)) for number in range(300)]
    assert any(file.hole >= 1 << 40 for file in found)
    assert any(file.data[:8] != content[:8] for file in found)
    assert any(b"\x00\x00\xc0\x7f" in file.data and b"\x00\x00\xc0\x7f" not in content for file in found)


# --- past the hashes
def test_a_signed_bundle_is_opened_and_its_files_fit_its_hashes(cases: Any, seeds: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(seeds / "bundle", folder)
    graph = folder / "graphs" / "step.fp32.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x80\x01\x00")
    importlib.import_module("resign").resign(folder)
    files = open_bundle(folder)
    assert files.file("graphs/step.fp32.onnx") == graph


def test_a_signed_snapshot_passes_its_checksum_with_other_values(seeds: Path, tmp_path: Path) -> None:
    edits = importlib.import_module("tensor_file_edits")
    content = (seeds / "session.snapshot").read_bytes()
    changed = content[:-1] + bytes([content[-1] ^ 1])
    signed = edits.sign_tensor_file(importlib.import_module("file_content").FileContent(changed))
    signed.write(tmp_path / "s")
    before, after = Snapshot.load(seeds / "session.snapshot"), Snapshot.load(tmp_path / "s")
    assert any((before.tensors[name] != after.tensors[name]).any() for name in before.tensors)
