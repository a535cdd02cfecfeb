"""A copy of a bundle to be spoiled: edited, then signed again, so that no hash gives the fault away."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fault_edits import Edit, set_tensor, stored_tensor

from crt_export.bundle import open_bundle
from crt_export.bundle.manifest import sealed
from crt_export.config import ModelConfig
from crt_export.parity.check import case_from_manifest
from crt_export.parity.setup import ParityCase


class SpoiledBundle:
    """One target of a copied bundle.

    Attributes:
        path: The copy.
        target: The target that is spoiled and checked.
        config: The model.
    """

    def __init__(self, source: Path, copy: Path, target: str) -> None:
        """Copy ``source``; of its targets only ``target`` stays in the manifest."""
        self.path, self.target = Path(shutil.copytree(source, copy)), target
        manifest = self.manifest
        manifest["targets"] = {target: manifest["targets"][target]}
        self._write(manifest)
        self.config = ModelConfig.from_dict(manifest["config"])

    @property
    def manifest(self) -> dict[str, Any]:
        """As it stands in the copy."""
        return json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))

    @property
    def graphs(self) -> dict[str, Path]:
        """ONNX file per graph name."""
        return {name: self.path / file for name, file in self.manifest["targets"][self.target]["graphs"].items()}

    @property
    def precision(self) -> str:
        """Of the target: ``fp32``, ``w8``, ..."""
        return self.manifest["targets"][self.target]["profile"]["precision"]

    def edit(self, names: Sequence[str], *edits: Edit) -> None:
        """Change graphs."""
        for name in names:
            path = self.graphs[name]
            model = onnx.load(path, load_external_data=False)
            for edit in edits:
                edit(model)
            onnx.save(model, path)

    def weight(self, name: str, graph: str = "step") -> np.ndarray:
        """Values of a weight, as the graphs of this precision store it."""
        return stored_tensor(self.graphs[graph], name)[1]

    def set_weight(self, name: str, values: np.ndarray, graph: str = "step") -> None:
        """Overwrite a weight in the file that all graphs of this precision share."""
        path, old, start = stored_tensor(self.graphs[graph], name)
        assert (values.shape, values.dtype) == (old.shape, old.dtype)
        assert not np.array_equal(values, old), f"{name} would stay as it is"
        content = bytearray(path.read_bytes())
        content[start : start + old.nbytes] = np.ascontiguousarray(values).tobytes()
        path.write_bytes(content)

    def set_weight_of(self, graph: str, name: str, values: np.ndarray) -> None:
        """Give one graph another value of a weight; the shared file stays."""
        self.edit([graph], set_tensor(name, values))

    def change_manifest(self, **changes: Any) -> None:
        """Replace top-level entries."""
        self._write({**self.manifest, **changes})

    def sign(self) -> None:
        """Write size and SHA-256 of every file as it is now."""
        manifest = self.manifest
        for name, entry in manifest["files"].items():
            content = (self.path / name).read_bytes()
            entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        self._write(manifest)

    def case(self) -> ParityCase:
        """The target as the evidence opens it, signed as it is now."""
        self.sign()
        return case_from_manifest(open_bundle(self.path, allow_unvalidated=True), self.target)

    def _write(self, manifest: dict[str, Any]) -> None:
        (self.path / "manifest.json").write_text(json.dumps(sealed(manifest), indent=1) + "\n", encoding="utf-8")
