"""One input of the fuzzer: which kind, which random changes, which files come of them.

Everything follows from kind, seed and number: the same three give the same bytes, whatever ran before.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import tomllib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from byte_edits import edit_bytes
from file_content import FileContent
from json_edits import edit_json
from onnx_edits import edit_onnx
from resign import resign
from seeds import BUNDLE, CHECKPOINT, PROFILE, ROOT, SIDECAR, SNAPSHOT, TARGET, TOKENIZER, tokenizer_texts
from tensor_file_edits import edit_tensor_file, sign_tensor_file
from toml_edits import edit_toml

from crt_export.bundle import MANIFEST_NAME

Editor = Callable[[bytes, Random], bytes | FileContent]

MOST_EDITS = 4
#: Of all changes, those that know nothing of the format.
_BLIND = 0.2

_GRAPHS = tuple(f"{BUNDLE}/graphs/{name}.fp32.onnx" for name in ("prefill_pass", "prefill", "step"))

#: Kind -> the files that are damaged, and who damages them.
KINDS: dict[str, tuple[tuple[str, ...], Editor]] = {
    "manifest": ((f"{BUNDLE}/{MANIFEST_NAME}",), edit_json),
    "onnx": ((_GRAPHS[0], *_GRAPHS), edit_onnx),
    "vectors": ((f"{BUNDLE}/selftest/vectors.safetensors",), edit_tensor_file),
    "snapshot": ((SNAPSHOT,), edit_tensor_file),
    "safetensors": ((f"{CHECKPOINT}/model.safetensors",), edit_tensor_file),
    "sidecar": ((SIDECAR,), edit_json),
    "profile": ((PROFILE,), edit_toml),
    "tokenizer": ((f"{TOKENIZER}/tokenizer.json",), edit_json),
}
_SIGNED_WITHIN = ("vectors", "snapshot")
#: Seeds of which there are several; the others are those of the folder.
_PROFILES = tuple(sorted((ROOT / "engines").glob("*.toml")))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Identifies an input.

    Attributes:
        kind: A key of KINDS.
        seed: Of the campaign.
        number: Of the case within its kind.
        edits: Which of the case's changes are made; a smaller set than all of them is a smaller input.
    """

    kind: str
    seed: int
    number: int
    edits: tuple[int, ...]

    @property
    def name(self) -> str:
        """``manifest-1-17``, with the changes where some are left out."""
        return f"{self.kind}-{self.seed}-{self.number}"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a case writes over the seeds.

    Attributes:
        files: Path in the folder of seeds to content.
        signed: Whether the bundle is signed again afterwards.
        ids: Token ids that the case also decodes.
    """

    files: Mapping[str, FileContent]
    signed: bool
    ids: tuple[int, ...]

    def write(self, folder: Path) -> None:
        """Store the files, then sign the bundle."""
        for name, content in self.files.items():
            content.write(folder / name)
        if PROFILE in self.files:
            _put_profile(folder)
        if self.signed:
            resign(folder / BUNDLE)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; :meth:`from_dict` reads them back."""
        return {
            "files": {
                name: {"data": base64.b64encode(zlib.compress(content.data)).decode(), "hole": content.hole}
                for name, content in self.files.items()
            },
            "signed": self.signed,
            "ids": list(self.ids),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Inputs:
        """Read what to_dict() gave."""
        files = {
            name: FileContent(zlib.decompress(base64.b64decode(entry["data"])), entry["hole"])
            for name, entry in values["files"].items()
        }
        return cls(files=files, signed=values["signed"], ids=tuple(values["ids"]))


def new_case(kind: str, seed: int, number: int) -> Case:
    """The case of that number, with all its changes."""
    count = 1 + min(int(Random(f"{kind} {seed} {number} count").expovariate(1.0)), MOST_EDITS - 1)
    return Case(kind=kind, seed=seed, number=number, edits=tuple(range(count)))


def smaller_cases(case: Case) -> list[Case]:
    """The case with one change less, every way."""
    subsets = ([kept for kept in case.edits if kept != dropped] for dropped in case.edits)
    return [dataclasses.replace(case, edits=tuple(subset)) for subset in subsets if subset]


def inputs_of_case(case: Case, seeds: Path) -> Inputs:
    """The files of a case.

    Args:
        case: The case.
        seeds: The folder of sound seeds.
    """
    names, editor = KINDS[case.kind]
    random = Random(f"{case.kind} {case.seed} {case.number}")
    name = random.choice(names)
    signed = random.random() < 0.5
    content = FileContent(_seed(case.kind, seeds / name, random))
    for edit in case.edits:
        content = _edited(content, editor, Random(f"{case.kind} {case.seed} {case.number} {edit}"))
    if signed and case.kind in _SIGNED_WITHIN:
        content = sign_tensor_file(content)
    ids = tuple(random.choice((-1, 255, 256, 2**40, random.randrange(256), random.randrange(256))) for _ in range(12))
    return Inputs(files={name: content}, signed=signed, ids=ids)


def _seed(kind: str, path: Path, random: Random) -> bytes:
    if kind == "tokenizer":
        return random.choice(tokenizer_texts()).encode()
    if kind == "profile" and random.random() < 0.5:
        path = random.choice(_PROFILES)
    return path.read_bytes()


def _edited(content: FileContent, editor: Editor, random: Random) -> FileContent:
    """One change by the editor of the format; a blind one now and then, and where the format is lost already."""
    try:
        if random.random() >= _BLIND:
            changed = editor(content.data, random)
            return changed if isinstance(changed, FileContent) else FileContent(changed, content.hole)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        pass
    return FileContent(edit_bytes(content.data, random), content.hole)


def _put_profile(folder: Path) -> None:
    """The profile's values in the manifest, where they can be there: C++ reads profiles nowhere else."""
    path = folder / BUNDLE / MANIFEST_NAME
    try:
        values = tomllib.loads((folder / PROFILE).read_bytes().decode())
        manifest = json.loads(path.read_bytes())
        manifest["targets"][TARGET]["profile"] = {"compute_capability": None, "options": {}, **values}
        text = json.dumps(manifest)
    except (ValueError, TypeError, RecursionError):
        return
    path.write_text(text, "utf-8", errors="surrogatepass")
    resign(folder / BUNDLE)
