"""Faults that the gate must catch: those of graphs, and here of weights, names, dtypes and the files beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
from fault_bundle import SpoiledBundle
from fault_edits import Edit, constant, node, replace_output
from faults_of_graphs import ARITHMETIC, BOTH, CACHES, PREFILL, ROPE, SESSION, STATE, STEP, TOKEN, Fault, beside, of
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from crt_export.checkpoint import load_checkpoint
from crt_export.selftest.vectors import RECURRENCE, VECTORS_FILE, load_vectors

STEPS_LEFT = 20
VECTOR_STEP = 3
_REFERENCE = "reference/model.safetensors"


def _scaled(name: str, factor: float, outputs: Callable[[SpoiledBundle], slice]) -> Callable[[SpoiledBundle], None]:
    """Some outputs of a linear layer multiplied, in the file all graphs share; an INT8 weight by its scales.

    A ``w8`` file holds q, k and v as one weight whose first outputs are those of q.
    """

    def inject(bundle: SpoiledBundle) -> None:
        wanted = outputs(bundle)
        if bundle.precision == "w8":
            scales = f"{name}_scales".replace(".attn.q.", ".attn.qkv.")
            values = bundle.weight(scales)  # [out, blocks]
            values[wanted] *= factor
            bundle.set_weight(scales, values)
        else:
            values = bundle.weight(name)  # [in, out]
            values[:, wanted] *= factor
            bundle.set_weight(name, values)

    return inject


def _transposed(bundle: SpoiledBundle) -> None:
    values = bundle.weight("layers.0.attn.o.weight")
    bundle.set_weight("layers.0.attn.o.weight", values.T)


def _zero_bias(bundle: SpoiledBundle) -> None:
    bundle.set_weight("layers.0.mlp.down.bias", np.zeros_like(bundle.weight("layers.0.mlp.down.bias")))


def _foreign_head(bundle: SpoiledBundle) -> None:
    """head.onnx with the output layer of another model: the same values in another order."""
    values = bundle.weight("lm_head.weight", "head")
    order = np.random.default_rng(0).permutation(values.shape[1])
    bundle.set_weight_of("head", "lm_head.weight", values[:, order])


def _short_tables(graph: str) -> Callable[[SpoiledBundle], None]:
    def inject(bundle: SpoiledBundle) -> None:
        for table in ROPE:
            bundle.set_weight_of(graph, table, bundle.weight(table)[:STEPS_LEFT])

    return inject


def _weights(
    name: str, inject: Callable[[SpoiledBundle], None], *says: str, precisions: tuple[str, ...] = BOTH
) -> Fault:
    return Fault(name=name, inject=inject, caught=dict.fromkeys(precisions, "contract"), says=says)


WEIGHTS = (
    _weights(
        "one weight tensor scaled by 1 %", _scaled("layers.0.mlp.up.weight", 1.01, lambda _: slice(None)),
        r"layers\.0\.mlp\.up",
    ),
    _weights(
        "one row of one weight scaled by 1 %", _scaled("lm_head.weight", 1.01, lambda _: slice(TOKEN, TOKEN + 1)),
        "lm_head",
    ),
    _weights(
        "one attention head's queries scaled by 1 %",
        _scaled("layers.0.attn.q.weight", 1.01, lambda bundle: slice(bundle.config.carried.caches[0].head_dim)),
        r"layers\.0\.attn\.q",
    ),
    _weights("a square weight transposed", _transposed, r"layers\.0\.attn\.o\.weight", precisions=("fp32",)),
    _weights("a bias left out", _zero_bias, r"layers\.0\.mlp\.down\.bias"),
    _weights("head of another bundle", _foreign_head, r"\bhead\b", r"lm_head\.weight", precisions=("fp32",)),
    _weights("fewer steps than asked: the session's graph ends early", _short_tables(SESSION), rf"\b{SESSION}\b"),
    dataclasses.replace(
        _weights("fewer steps than asked: step ends early", _short_tables(STEP), r"\bstep\b"), interchange=True
    ),
)  # fmt: skip


def _rename_output(model: onnx.ModelProto) -> None:
    replace_output("logits", node("Identity", ["before"], "log_probabilities"))(model)
    next(output for output in model.graph.output if output.name == "logits").name = "log_probabilities"


def _add_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(node("Identity", ["logits"], "debug"))
    model.graph.output.append(helper.make_tensor_value_info("debug", TensorProto.FLOAT, ["batch", 256]))


def _drop_output(model: onnx.ModelProto) -> None:
    kept = [output for output in model.graph.output if output.name != "next_state"]
    del model.graph.output[:]
    model.graph.output.extend(kept)


def _halve(name: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        replace_output(name, node("Cast", ["before"], name, to=TensorProto.FLOAT16))(model)
        output = next(output for output in model.graph.output if output.name == name)
        output.type.tensor_type.elem_type = TensorProto.FLOAT16

    return edit


_UNEXPECTED = "found, which is not part of the contract"
_MISSING = "expected, nothing found"
CONTRACT = (
    *beside("an output of {} renamed", "contract", _rename_output, says=(f"logits: .* {_MISSING}",)),
    *beside("an extra output of {}", "contract", _add_output, says=(f"debug: .* {_UNEXPECTED}",)),
    of("an output of prefill left out", "contract", _drop_output, graphs=(PREFILL,),
       says=(r"\bprefill\b", f"next_state: .* {_MISSING}")),
    of("an output of the session's graph left out", "contract", _drop_output, graphs=(SESSION,),
       says=(rf"\b{SESSION}\b", f"next_state: .* {_MISSING}")),
    *beside("dtype of the logits of {} changed", "contract", _halve("logits"), says=("logits", "float32.*float16")),
    of("dtype of the state of prefill changed", "contract", _halve("next_state"), graphs=(PREFILL,),
       says=(r"\bprefill\b", "next_state", "float32.*float16")),
    *beside("an operator in {} that no target was checked with", "contract",
            replace_output("logits", node("Sin", ["before"], "logits")), says=("Sin",)),
    *beside("next_token of {} is not the argmax", "one-step",
            replace_output("next_token", constant("none", 0), node("Mul", ["before", "none"], "next_token")),
            says=("next_token",)),
)  # fmt: skip


def _other_reference(bundle: SpoiledBundle) -> None:
    """The checkpoint of a model of the same shape that was trained a little longer."""
    tensors = load_file(bundle.path / _REFERENCE)
    tensors["layers.0.mlp.up.weight"] = tensors["layers.0.mlp.up.weight"] * np.float32(1.01)
    save_file(tensors, bundle.path / _REFERENCE)


def _other_reference_with_its_hash(bundle: SpoiledBundle) -> None:
    _other_reference(bundle)
    reference = load_checkpoint(bundle.path / "reference")
    bundle.change_manifest(checkpoint={**bundle.manifest["checkpoint"], "sha256": reference.sha256})


def _other_vectors(bundle: SpoiledBundle) -> None:
    """One logit of one step is another, and the file's own checksum says so."""
    file = bundle.path / VECTORS_FILE
    vectors = load_vectors(file, bundle.config.info, bundle.manifest["checkpoint"]["sha256"])
    name = f"{RECURRENCE}.logits.{VECTOR_STEP}"
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
        caught=dict.fromkeys(BOTH, "opening"),
        says=("reference", r"content hash \w+ is not that of the checkpoint"),
    ),
    _weights("reference of another model, the manifest made to fit", _other_reference_with_its_hash,
             r"layers\.0\.mlp\.up"),
    Fault(
        name="self-test vectors tampered with, checksum and all",
        inject=_other_vectors,
        caught=dict.fromkeys(BOTH, "selftest"),
        says=("logits", rf"\b{VECTOR_STEP}\b"),
    ),
    Fault(
        name="self-test vectors with a flipped bit",
        inject=_torn_vectors,
        caught=dict.fromkeys(BOTH, "selftest"),
        says=("vectors",),
    ),
)  # fmt: skip

FAULTS: tuple[Fault, ...] = (*WEIGHTS, *STATE, *CACHES, *ARITHMETIC, *CONTRACT, *FILES)
