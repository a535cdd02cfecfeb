"""A byte of a bundle is hashed once where it is written or taken from the cache, and once where it is opened."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.pipeline import BuildOptions, build

#: Files that are as large as the weights in them, and graphs, which are hashed by the same rule.
LARGE = (".weights", ".onnx", ".engine", "model.safetensors")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often every content was hashed to its end, by its SHA-256."""
    counts: Counter[str] = Counter()
    sha256, file_digest = hashlib.sha256, hashlib.file_digest

    class Counting:
        def __init__(self, data: Any = b"") -> None:
            self._digest = sha256(data)
            self.update, self.digest, self.digest_size = self._digest.update, self._digest.digest, 32

        def hexdigest(self) -> str:
            counts[self._digest.hexdigest()] += 1
            return self._digest.hexdigest()

    def counting_file(stream: Any, name: str) -> Any:
        found = file_digest(stream, name)
        counts[found.hexdigest()] += 1
        return found

    monkeypatch.setattr(hashlib, "sha256", Counting)
    monkeypatch.setattr(hashlib, "file_digest", counting_file)
    return counts


@pytest.mark.parametrize("validated", [True, False], ids=["validated", "unvalidated"])
def test_a_weight_file_is_hashed_where_it_is_written_and_where_it_is_opened(
    make_checkpoint: Callable[..., Path], heldout_text: Path, tmp_path: Path, hashed: Counter[str], validated: bool
) -> None:
    checkpoint = make_checkpoint(num_hidden_layers=1, unroll_steps=2)
    text: dict[str, Any] = {"text": heldout_text, "short_reason": "a count of hashings"} if validated else {}
    for name in ("cold", "warm"):
        hashed.clear()
        options = BuildOptions(
            checkpoint=checkpoint,
            output=tmp_path / name,
            targets=("ort-cpu-fp32",),
            validated=validated,
            cache=tmp_path / "cache",
            **text,
        )
        build(options)
        files = json.loads((tmp_path / name / "manifest.json").read_text())["files"]
        found = {file: hashed[entry["sha256"]] for file, entry in files.items() if file.endswith(LARGE)}
        once = 2 if validated else 1
        # The reference was hashed where the checkpoint was read, and is once more where its copy is written.
        assert found == {file: 2 if file.startswith("reference/") else once for file in found}
        assert {"graphs/fp32.weights", "graphs/step.fp32.onnx", "reference/model.safetensors"} <= set(found)
