"""The sound inputs that the fuzzer damages: the golden bundle, and what belongs to it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from resign import signed_text

from crt_export.bundle import MANIFEST_NAME, open_bundle
from crt_export.machine import Gpu
from crt_export.models.declaration import ModelInfo
from crt_export.profile import EngineProfile, load_profile
from crt_export.runtime import Snapshot
from crt_export.spec import GraphSpec, graph_spec

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "validate" / "golden"
TARGET = "ort-cpu-fp32"

#: Where a seed of each kind lies; a damaged one takes its place in a copy of the folder.
BUNDLE = "bundle"
SNAPSHOT, SIDECAR, PROFILE = "session.snapshot", "step.json", "profile.toml"
CHECKPOINT, TOKENIZER = "checkpoint", "tokenizer"

#: The engine that the sidecar speaks of.
SIDECAR_PROFILE, SIDECAR_VERSION = "rtx-sm80-fp16", "1.7.1.116"
SIDECAR_GPU = Gpu(name="A100", compute_capability=80)


def write_seeds(folder: Path) -> None:
    """Lay every seed into an empty folder."""
    bundle = folder / BUNDLE
    shutil.copytree(GOLDEN / "bundle-v1", bundle)
    _shorten(bundle)
    opened = open_bundle(bundle)
    snapshot = Snapshot.load(GOLDEN / "bundle-v1.recorded" / "session.snapshot")
    dataclasses.replace(snapshot, bundle=opened.identity).save(folder / SNAPSHOT)
    shutil.copytree(bundle / "reference", folder / CHECKPOINT)
    model = ModelInfo.from_dict(opened.manifest["model"])
    (folder / SIDECAR).write_text(json.dumps(_sidecar(model), indent=1), "utf-8")
    shutil.copy(ROOT / "engines" / f"{TARGET}.toml", folder / PROFILE)
    (folder / TOKENIZER).mkdir()
    (folder / TOKENIZER / "tokenizer.json").write_text(tokenizer_texts()[0], "utf-8")


def sidecar_contract(model: ModelInfo) -> tuple[EngineProfile, GraphSpec]:
    """The profile of the engine that the sidecar describes, and its contract."""
    profile = load_profile(SIDECAR_PROFILE)
    return profile, graph_spec("step", model, profile.cache_dtype, profile.capacity)


def _shorten(bundle: Path) -> None:
    """Keep one target and its graphs, and leave out the report of the validation, nine tenths of the manifest."""
    path = bundle / MANIFEST_NAME
    manifest = json.loads(path.read_bytes())
    manifest["parity"] = {"passed": True}
    manifest["targets"] = {TARGET: manifest["targets"][TARGET]}
    manifest["graphs"] = [graph for graph in manifest["graphs"] if graph["precision"] == "fp32"]
    for name in [name for name in manifest["files"] if ".w8." in name or "w8.weights" in name]:
        (bundle / name).unlink()
        del manifest["files"][name]
    path.write_text(signed_text(manifest), "utf-8")


def _sidecar(model: ModelInfo) -> dict[str, Any]:
    profile, contract = sidecar_contract(model)
    values = contract.to_dict()
    for tensor in values["inputs"]:
        for limit, size in (("min", profile.batch.min), ("opt", profile.batch.opt), ("max", profile.batch.max)):
            tensor[limit] = [size if dim == "batch" else dim for dim in tensor["dims"]]
    return {
        "graph": "step",
        "unroll": 1,
        "linears": 9,
        "runtime_version": SIDECAR_VERSION,
        "target": profile.name,
        "runtime": profile.runtime,
        "compute_capability": profile.compute_capability,
        "precision": profile.precision,
        "capacity": profile.capacity,
        "options": {"optimization_level": 3, "ampere_plus": False, "version_compatible": False},
        **values,
    }


def tokenizer_texts() -> tuple[str, ...]:
    """A tokenizer.json of every decoder: byte level, metaspace with byte fallback, WordPiece, Unigram."""
    letters = [*"abcdefghijklmnopqrstuvwxyz .,é"]
    bpe = {"type": "BPE", "vocab": _numbered([*letters, "Ġ", "th", "the"]), "merges": ["t h", "th e"]}
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    llama = {
        "type": "BPE",
        "vocab": _numbered(["<unk>", *fallback, *letters, "▁", "▁t"]),
        "merges": ["▁ t"],
        "unk_token": "<unk>",
        "byte_fallback": True,
    }
    words = {
        "type": "WordPiece",
        "vocab": _numbered(["[UNK]", *letters, *(f"##{letter}" for letter in letters), "the"]),
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    }
    pieces = [["<unk>", 0.0], *([letter, -3.0] for letter in letters), ["▁", -2.0], ["▁the", -4.0]]
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    llama_decoder = {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]}
    return (
        _tokenizer(bpe, byte_level, byte_level),
        _tokenizer(llama, metaspace, llama_decoder),
        _tokenizer(words, {"type": "BertPreTokenizer"}, {"type": "WordPiece", "prefix": "##", "cleanup": True}),
        _tokenizer(unigram, metaspace, metaspace),
    )


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _tokenizer(model: dict[str, Any], pre_tokenizer: dict[str, Any], decoder: dict[str, Any]) -> str:
    special = {"id": 300, "content": "<end>", "single_word": False, "lstrip": False, "rstrip": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**special, "normalized": False, "special": True}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(document, ensure_ascii=False)
