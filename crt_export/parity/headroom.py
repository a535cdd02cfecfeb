"""The largest |value| of every FP16 tensor of a graph on real text.

ONNX Runtime's CPU provider multiplies FP16 in FP32 between casts, so an overflow need not show in the logits there. It
shows here: every FP16 value is reduced to its largest magnitude inside the graph, NaN counting as infinite (a maximum
drops NaN), and a value that ONNX Runtime kept in FP32 is seen at its true size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from crt_export.config import ModelConfig
from crt_export.engine.ort import OrtGraph, import_onnxruntime
from crt_export.errors import ContractError
from crt_export.parity.binding import BoundGraph, new_caches
from crt_export.parity.case import ParityCase
from crt_export.parity.reference import PREFILL, STEP
from crt_export.parity.windows import Windows
from crt_export.spec import GraphSpec, TensorSpec

OUTPUT = "largest_fp16_values"
#: Graphs whose tensors are observed; prefill_pass has those of prefill and head is part of both.
OBSERVED = (STEP, PREFILL)
_PREFIX = "observed/"
_MASK_FILL = 1e4


def largest_fp16_values(
    case: ParityCase, name: str, config: ModelConfig, windows: Windows, *, batch: int, threads: int
) -> dict[str, float]:
    """Run one graph over all windows and observe it.

    Args:
        case: An FP16 target.
        name: ``step`` (teacher-forced from the first token) or ``prefill`` (the whole window at once).
        config: The model.
        windows: Real text.
        batch: Windows per call.
        threads: CPU threads, 0 for every core.

    Returns:
        Largest |value| per tensor, infinite where a value is NaN; attention scores carry the node's name and
        ``(scores)``. Largest first.

    Raises:
        ContractError: The graph cannot be read or run, or the type of a tensor cannot be told.
    """
    graph, names = load_observed(case.graphs[name], case, threads)
    spec = case.spec(name, config)
    spec = GraphSpec(
        name=spec.name,
        inputs=spec.inputs,
        outputs=(*spec.outputs, TensorSpec(name=OUTPUT, dtype="float32", dims=(len(names),))),
        aliases=spec.aliases,
    )
    largest = np.zeros(len(names), np.float32)
    for start in range(0, windows.count, batch):
        ids = windows.inputs[start : start + batch]
        sizes = {"batch": len(ids), "seq": ids.shape[1], "capacity": case.capacity or windows.length}
        bound = BoundGraph(graph, spec, sizes, new_caches(spec, sizes))
        for _ in _step_calls(bound, ids) if name == STEP else _prefill_calls(bound, ids):
            largest = np.maximum(largest, bound.read(OUTPUT))  # maximum, unlike fmax, keeps NaN
    found = {label: float(value) for label, value in zip(names, np.nan_to_num(largest, nan=np.inf), strict=True)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _step_calls(bound: BoundGraph, ids: np.ndarray) -> Iterator[None]:
    for position in range(ids.shape[1]):
        bound.run(input_ids=ids[:, position : position + 1], position=np.full(len(ids), position))
        yield
        if bound.has("next_state"):
            bound.set(state=bound.read("next_state"))


def _prefill_calls(bound: BoundGraph, ids: np.ndarray) -> Iterator[None]:
    bound.run(input_ids=ids, length=np.full(len(ids), ids.shape[1]))
    yield


def load_observed(path: Path, case: ParityCase, threads: int) -> tuple[OrtGraph, list[str]]:
    """Load a graph with one more output, the largest |value| of each of its FP16 tensors.

    Returns:
        The graph and the tensors' names in the order of the output.

    Raises:
        ContractError: The file cannot be read or loaded, or the type of a tensor cannot be told.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        model = onnx.shape_inference.infer_shapes(model)
    except Exception as error:  # protobuf and onnx raise many kinds for a damaged file
        raise ContractError(f"{path}: not a readable ONNX file ({error})") from error
    names = observe_fp16(model)
    library = import_onnxruntime()
    options = library.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = library.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(case.disabled_optimizers) or None,
        )
    except Exception as error:  # ONNX Runtime raises RuntimeError or one of a dozen classes of its own
        raise ContractError(f"{path}: ONNX Runtime cannot load it with observers ({error})") from error
    return OrtGraph(path, session, "cpu"), names


def observe_fp16(model: onnx.ModelProto) -> list[str]:
    """Append the observers to the graph; see :func:`load_observed` for what they deliver.

    Requires: types are inferred.
    Ensures: every FP16 input and every FP16 node output is observed, but for the output of a mask's Where.

    Raises:
        ContractError: The type of a node's output is unknown, or no tensor is FP16.
    """
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    produced = [(name, node) for node in graph.node for name in node.output if name]
    unknown = [name for name, _ in produced if not types.get(name)]
    if unknown:
        raise ContractError(
            f"graph {graph.name}: the types of {len(unknown)} tensors are unknown, such as {unknown[0]}"
        )
    observed = [value.name for value in graph.input if types[value.name] == TensorProto.FLOAT16]
    observed += [
        name for name, node in produced if types[name] == TensorProto.FLOAT16 and not _is_mask_fill(node, constants)
    ]
    if not observed:
        raise ContractError(f"graph {graph.name}: no tensor is FP16")
    nodes = [node for name in observed for node in _observer(name, name)]
    scores = [
        node for node in graph.node if node.op_type == "Attention" and types[node.output[0]] == TensorProto.FLOAT16
    ]
    labels = [*observed]
    for node in scores:
        labels.append(f"{node.name or node.output[0]} (scores)")
        nodes += _score_nodes(node, labels[-1])
    graph.initializer.extend(
        [
            helper.make_tensor(f"{_PREFIX}one", TensorProto.INT64, [1], [1]),
            helper.make_tensor(f"{_PREFIX}infinity", TensorProto.FLOAT, [], [float("inf")]),
        ]
    )
    graph.node.extend(nodes)
    graph.node.append(helper.make_node("Concat", [f"{_PREFIX}{label}" for label in labels], [OUTPUT], axis=0))
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [len(labels)]))
    return labels


def _observer(source: str, label: str) -> Iterator[onnx.NodeProto]:
    """Nodes from a tensor to its largest |value|, float32 [1], NaN as infinity."""
    base = f"{_PREFIX}{label}"
    yield helper.make_node("Cast", [source], [f"{base}/wide"], to=TensorProto.FLOAT)
    yield helper.make_node("Abs", [f"{base}/wide"], [f"{base}/size"])
    yield helper.make_node("IsNaN", [f"{base}/size"], [f"{base}/nan"])
    yield helper.make_node("Where", [f"{base}/nan", f"{_PREFIX}infinity", f"{base}/size"], [f"{base}/real"])
    yield helper.make_node("ReduceMax", [f"{base}/real"], [f"{base}/largest"], keepdims=0)
    yield helper.make_node("Reshape", [f"{base}/largest", f"{_PREFIX}one"], [base])


def _score_nodes(node: onnx.NodeProto, label: str) -> Iterator[onnx.NodeProto]:
    """The scores inside an Attention node, q k^T scale, which a kernel may hold in FP16."""
    base = f"{_PREFIX}{label}"
    scale = next((attribute.f for attribute in node.attribute if attribute.name == "scale"), 1.0)
    yield helper.make_node("Cast", [node.input[0]], [f"{base}/q"], to=TensorProto.FLOAT)
    yield helper.make_node("Cast", [node.input[1]], [f"{base}/k"], to=TensorProto.FLOAT)
    yield helper.make_node("Transpose", [f"{base}/k"], [f"{base}/kt"], perm=[0, 1, 3, 2])
    factor = helper.make_tensor("scale", TensorProto.FLOAT, [], [scale])
    yield helper.make_node("Constant", [], [f"{base}/scale"], value=factor)
    yield helper.make_node("Mul", [f"{base}/q", f"{base}/scale"], [f"{base}/scaled"])
    yield helper.make_node("MatMul", [f"{base}/scaled", f"{base}/kt"], [f"{base}/scores"])
    yield from _observer(f"{base}/scores", label)


def _is_mask_fill(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    """A Where that fills masked scores: its fill is huge on purpose, and what it fills is observed at its source."""
    if node.op_type != "Where":
        return False
    fills = [constants[name] for name in node.input[1:] if name in constants]
    return any(_largest_constant(fill) >= _MASK_FILL for fill in fills)


def _largest_constant(tensor: TensorProto) -> float:
    if tensor.data_location == TensorProto.EXTERNAL:
        return 0.0
    values = onnx.numpy_helper.to_array(tensor)
    return float(np.abs(values.astype(np.float64)).max()) if values.size and values.dtype.kind == "f" else 0.0
