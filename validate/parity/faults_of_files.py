"""Faults in the files beside the graphs: the reference and the vectors of the self-test."""

from __future__ import annotations

import dataclasses

import numpy as np
from fault import TOKEN, Fault
from fault_bundle import SpoiledBundle
from safetensors.numpy import load_file, save_file

from crt_export.checkpoint import load_checkpoint
from crt_export.selftest.vectors import RECURRENCE, VECTORS_FILE, load_vectors

STEP = 3
WEIGHTS = "reference/model.safetensors"


def _other_reference(bundle: SpoiledBundle) -> None:
    """The checkpoint of a model of the same shape that was trained a little longer."""
    tensors = load_file(bundle.path / WEIGHTS)
    tensors["layers.0.mlp.up.weight"] = tensors["layers.0.mlp.up.weight"] * np.float32(1.01)
    save_file(tensors, bundle.path / WEIGHTS)


def _other_reference_with_its_hash(bundle: SpoiledBundle) -> None:
    _other_reference(bundle)
    reference = load_checkpoint(bundle.path / "reference")
    bundle.change_manifest(checkpoint={**bundle.manifest["checkpoint"], "sha256": reference.sha256})


def _other_vectors(bundle: SpoiledBundle) -> None:
    """One logit of one step is another, and the file's own checksum says so."""
    file = bundle.path / VECTORS_FILE
    vectors = load_vectors(file, bundle.config, bundle.manifest["checkpoint"]["sha256"])
    name = f"{RECURRENCE}.logits.{STEP}"
    changed = vectors.tensors[name].copy()
    changed[TOKEN % len(changed)] += np.abs(changed).max()
    file.write_bytes(dataclasses.replace(vectors, tensors={**vectors.tensors, name: changed}).to_bytes())


def _torn_vectors(bundle: SpoiledBundle) -> None:
    content = bytearray((bundle.path / VECTORS_FILE).read_bytes())
    content[-1] ^= 1
    (bundle.path / VECTORS_FILE).write_bytes(content)


FILES = (
    Fault(
        name="reference of another model",
        inject=_other_reference,
        caught={"fp32": "opening", "w8": "opening"},
        says=(r"reference", r"content hash \w+ is not that of the checkpoint"),
    ),
    Fault(
        name="reference of another model, the manifest made to fit",
        inject=_other_reference_with_its_hash,
        caught={"fp32": "contract", "w8": "contract"},
        says=(r"layers\.0\.mlp\.up",),
    ),
    Fault(
        name="self-test vectors tampered with, checksum and all",
        inject=_other_vectors,
        caught={"fp32": "selftest", "w8": "selftest"},
        says=(r"logits", rf"\b{STEP}\b"),
    ),
    Fault(
        name="self-test vectors with a flipped bit",
        inject=_torn_vectors,
        caught={"fp32": "selftest", "w8": "selftest"},
        says=(r"vectors",),
    ),
)
