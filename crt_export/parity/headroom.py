"""The largest |value| of every FP16 tensor of a graph on real text.

ONNX Runtime's CPU provider multiplies FP16 in FP32 between casts, so an overflow need not show in the logits there. It
shows here: a graph gets one more output, to which observers inside it reduce every FP16 tensor's largest magnitude; a
value that ONNX Runtime kept in FP32 is seen at its true size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from crt_export.checkpoint import tensor_shapes
from crt_export.config import ModelConfig
from crt_export.engine.base import BufferSlice, Engine, Launch, Program
from crt_export.engine.onnxruntime import HostBuffer, OrtGraph
from crt_export.engine.ort import import_onnxruntime
from crt_export.errors import ContractError
from crt_export.parity.reference import PREFILL, STEP
from crt_export.parity.runner import Runner
from crt_export.parity.setup import ParityCase
from crt_export.parity.tap import WatchedEngine
from crt_export.parity.windows import Windows

#: Graphs whose tensors are observed; prefill_pass has those of prefill and head is part of both.
OBSERVED = (STEP, PREFILL)
_OBSERVED_BYTES = 2**30
OUTPUT = "largest_fp16_values"
_PREFIX = "observed/"
_MASK_FILL = 1e4


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the entries of the added output are.

    Attributes:
        tensors: Names of the FP16 tensors whose largest |value| comes first.
        scores: Per Attention node its name and scale; for each the largest norm of a query and that of a key follow.
    """

    tensors: tuple[str, ...]
    scores: tuple[tuple[str, float], ...]

    @property
    def count(self) -> int:
        """Entries of the output."""
        return len(self.tensors) + 2 * len(self.scores)

    def largest(self, values: np.ndarray) -> dict[str, float]:
        """Largest |value| by name, from the entries' maxima over all calls, float32 [count].

        A key written in one call meets the queries of later ones, so only norms over all calls bound the scores:
        ``|q . k| scale <= |q| |k| scale``.
        """
        found = {name: float(value) for name, value in zip(self.tensors, values, strict=False)}
        norms = values[len(self.tensors) :].astype(np.float64).reshape(-1, 2).prod(axis=1)
        bounds = {
            f"{name} (bound of its scores)": float(norm) * abs(scale)
            for (name, scale), norm in zip(self.scores, norms, strict=True)
        }
        return found | bounds


def largest_fp16_values(
    runner: Runner, case: ParityCase, name: str, windows: Windows, *, batch: int, threads: int
) -> dict[str, float]:
    """Run one graph over all windows and observe it.

    Args:
        runner: An FP16 target.
        case: The same.
        name: ``step`` (teacher-forced from the first token) or ``prefill`` (the whole window at once).
        windows: Real text.
        batch: Most windows per call; fewer where memory is short, as no observed value can be dropped early.
        threads: CPU threads, 0 for every core.

    Returns:
        Largest |value| per tensor, infinite where a value is NaN; for the scores inside an Attention node an upper
        bound. Largest first.

    Raises:
        ContractError: The graph cannot be read or run, or the type of a tensor cannot be told.
    """
    engine = observing_engine(runner, case, name, threads)
    observed = runner.over(engine)
    batch = min(batch, _affordable_windows(case, name, runner.config, windows.length))
    for start in range(0, windows.count, batch):
        ids = windows.inputs[start : start + batch]
        decoding = observed.decoding(len(ids), windows.length)
        if name == PREFILL:
            decoding.prefill(ids, case.unroll)
        else:
            for position in range(ids.shape[1]):
                decoding.step(ids[:, position])
    return dict(sorted(engine.largest().items(), key=lambda item: -item[1]))


def _affordable_windows(case: ParityCase, name: str, config: ModelConfig, length: int) -> int:
    """Windows per call whose observed values, all alive at once in FP32, stay within ``_OBSERVED_BYTES``."""
    seq, passes = (1, 1) if name == STEP else (length, case.unroll)
    keys = (case.capacity or length) + (0 if name == STEP else seq)
    # Activations: what linears read and write, a few times over for norms and activation functions, and the scores.
    shapes = [shape for shape in tensor_shapes(config).values() if len(shape) == 2]
    linears = 2 * sum(map(sum, shapes)) - 2 * config.vocab_size
    scores = 4 * keys * sum(cache.query_heads for cache in config.carried.caches)
    return max(1, _OBSERVED_BYTES // (4 * (linears + scores) * passes * seq))


class ObservingEngine(WatchedEngine):
    """A runner's engine with one graph that observes itself."""

    def __init__(self, engine: Engine, name: str, graph: OrtGraph, observed: Observed) -> None:
        """Take the place of an engine.

        Args:
            engine: What answers for everything but the graph.
            name: Name of the graph.
            graph: The graph with one more output.
            observed: What the entries of that output are.
        """
        super().__init__(engine)
        self._name, self._observed, self._graph = name, observed, _ObservingGraph(graph, observed.count)

    def program(self, graph: str) -> Program:
        """The loaded graph of this name."""
        return self._graph if graph == self._name else super().program(graph)

    def largest(self) -> dict[str, float]:
        """Largest |value| by tensor of all launches so far, infinite where a value is NaN."""
        return self._observed.largest(np.nan_to_num(self._graph.largest, nan=np.inf))


class _ObservingGraph:
    """A graph that keeps the largest values of all launches; its output of observers is bound to memory of its own."""

    def __init__(self, graph: OrtGraph, entries: int) -> None:
        self._graph = graph
        self._found = HostBuffer((entries,), "float32")
        self.inputs = graph.inputs
        self.outputs = tuple(spec for spec in graph.outputs if spec.name != OUTPUT)
        self.largest = np.zeros(entries, np.float32)

    def bind(
        self, inputs: Mapping[str, BufferSlice], outputs: Mapping[str, BufferSlice], *, repeated: bool = False
    ) -> Launch:
        found = BufferSlice(self._found, 0, len(self.largest))
        launch = self._graph.bind(inputs, {**outputs, OUTPUT: found}, repeated=repeated)

        def run() -> None:
            launch()
            self.largest = np.maximum(self.largest, self._found.read())  # maximum, unlike fmax, keeps NaN

        return run


def observing_engine(runner: Runner, case: ParityCase, name: str, threads: int) -> ObservingEngine:
    """The runner's engine, one of whose graphs has one more output: the largest |value| of each of its FP16 tensors.

    Args:
        runner: The target.
        case: The target.
        name: Name of the graph, ``step`` or ``prefill``.
        threads: CPU threads, 0 for every core.

    Raises:
        ContractError: The file cannot be read or loaded, or the type of a tensor cannot be told.
    """
    path = case.graphs[name]
    try:
        model = onnx.load(path, load_external_data=False)
        model = onnx.shape_inference.infer_shapes(model)
    except Exception as error:  # protobuf and onnx raise many kinds for a damaged file
        raise ContractError(f"{path}: not a readable ONNX file ({error})") from error
    observed = observe_fp16(model)
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
    return ObservingEngine(runner.engine, name, OrtGraph(path, session, "cpu", threads=threads), observed)


def observe_fp16(model: onnx.ModelProto) -> Observed:
    """Add the observers.

    Requires: types are inferred.
    Ensures: every FP16 tensor that a node computes is observed at least once. Left out are caches (what is written into
        them is observed), what a mask fills (the scores before are observed) and softmax, which cannot exceed 1.

    Raises:
        ContractError: The type of a node's output is unknown, or no tensor is FP16.
    """
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    produced = {name: node for node in graph.node for name in node.output if name}
    unknown = [name for name in produced if not types.get(name)]
    if unknown:
        raise ContractError(
            f"graph {graph.name}: the types of {len(unknown)} tensors are unknown, such as {unknown[0]}"
        )
    half = {name: node for name, node in produced.items() if types[name] == TensorProto.FLOAT16}
    tensors = [name for name, node in half.items() if not _needs_no_observer(node, constants)]
    attention = [node for node in half.values() if node.op_type == "Attention"]
    if not tensors:
        raise ContractError(f"graph {graph.name}: no tensor is FP16")
    nodes = [part for name in tensors for part in _largest_value(name)]
    results = [_result(name) for name in tensors]
    for node in attention:
        for source in (node.input[0], _written_keys(node.input[1], produced)):
            # Equal keys may serve several nodes, so the result carries the reader's name too.
            label = f"{node.name or node.output[0]}/{source}"
            nodes += _largest_norm(source, label)
            results.append(_result(label))
    _append(graph, nodes, results)
    return Observed(
        tensors=tuple(tensors), scores=tuple((node.name or node.output[0], _scale(node)) for node in attention)
    )


def _append(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], results: list[str]) -> None:
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([1], np.int64), f"{_PREFIX}one"),
            numpy_helper.from_array(np.array([-1], np.int64), f"{_PREFIX}last"),
            numpy_helper.from_array(np.array(np.inf, np.float32), f"{_PREFIX}infinity"),
        ]
    )
    graph.node.extend(nodes)
    graph.node.append(helper.make_node("Concat", results, [OUTPUT], axis=0))
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [len(results)]))


def _result(label: str) -> str:
    return f"{_PREFIX}{label}"


def _largest_value(source: str) -> Iterator[onnx.NodeProto]:
    """Nodes from a tensor to its largest |value|, float32 [1]; NaN becomes infinity, because a maximum drops it.

    A sum of magnitudes is NaN where one of them is and nowhere else, so no tensor is written a second time to find it.
    """
    base = _result(source)
    yield helper.make_node("Cast", [source], [f"{base}/wide"], to=TensorProto.FLOAT)
    yield helper.make_node("Abs", [f"{base}/wide"], [f"{base}/size"])
    yield helper.make_node("ReduceSum", [f"{base}/size"], [f"{base}/sum"], keepdims=0)
    yield helper.make_node("ReduceMax", [f"{base}/size"], [f"{base}/real"], keepdims=0)
    yield helper.make_node("IsNaN", [f"{base}/sum"], [f"{base}/nan"])
    yield helper.make_node("Where", [f"{base}/nan", f"{_PREFIX}infinity", f"{base}/real"], [f"{base}/largest"])
    yield helper.make_node("Reshape", [f"{base}/largest", f"{_PREFIX}one"], [base])


def _largest_norm(source: str, label: str) -> Iterator[onnx.NodeProto]:
    """Nodes from vectors [..., head_dim] to the largest of their norms, float32 [1]."""
    base = _result(label)
    yield helper.make_node("Cast", [source], [f"{base}/wide"], to=TensorProto.FLOAT)
    yield helper.make_node("ReduceL2", [f"{base}/wide", f"{_PREFIX}last"], [f"{base}/norms"], keepdims=0)
    yield helper.make_node("ReduceMax", [f"{base}/norms"], [f"{base}/largest"], keepdims=0)
    yield helper.make_node("Reshape", [f"{base}/largest", f"{_PREFIX}one"], [base])


def _written_keys(name: str, produced: Mapping[str, onnx.NodeProto]) -> str:
    """The keys that this call adds to what an Attention reads: older ones were observed when they were written."""
    node = produced.get(name)
    if node is None or node.op_type not in ("TensorScatter", "Concat"):
        return name
    return node.input[1] if node.op_type == "TensorScatter" else node.input[-1]


def _scale(node: onnx.NodeProto) -> float:
    return next((attribute.f for attribute in node.attribute if attribute.name == "scale"), 1.0)


def _needs_no_observer(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    if node.op_type in ("TensorScatter", "Softmax"):
        return True
    if node.op_type != "Where":
        return False
    fills = [constants[name] for name in node.input[1:] if name in constants]
    return any(_largest_constant(fill) >= _MASK_FILL for fill in fills)


def _largest_constant(tensor: TensorProto) -> float:
    if tensor.data_location == TensorProto.EXTERNAL:
        return 0.0
    values = numpy_helper.to_array(tensor)
    return float(np.abs(values.astype(np.float64)).max()) if values.size and values.dtype.kind == "f" else 0.0
