"""The largest |value| of every FP16 tensor of a graph on real text.

ONNX Runtime's CPU provider multiplies FP16 in FP32 between casts, so an overflow need not show in the logits there. It
shows here: :mod:`crt_export.parity.observers` reduces every FP16 value to its largest magnitude inside the graph, and a
value that ONNX Runtime kept in FP32 is seen at its true size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from crt_export.config import ModelConfig
from crt_export.engine.ort import OrtGraph, import_onnxruntime
from crt_export.errors import ContractError
from crt_export.parity.binding import BoundGraph, new_caches
from crt_export.parity.case import ParityCase
from crt_export.parity.observers import OUTPUT, Observed, observe_fp16
from crt_export.parity.reference import PREFILL, STEP
from crt_export.parity.windows import Windows
from crt_export.spec import GraphSpec, TensorSpec

#: Graphs whose tensors are observed; prefill_pass has those of prefill and head is part of both.
OBSERVED = (STEP, PREFILL)
_OBSERVED_BYTES = 2**30


def largest_fp16_values(
    case: ParityCase, name: str, config: ModelConfig, windows: Windows, *, batch: int, threads: int
) -> dict[str, float]:
    """Run one graph over all windows and observe it.

    Args:
        case: An FP16 target.
        name: ``step`` (teacher-forced from the first token) or ``prefill`` (the whole window at once).
        config: The model.
        windows: Real text.
        batch: Most windows per call; fewer where memory is short, as no observed value can be dropped early.
        threads: CPU threads, 0 for every core.

    Returns:
        Largest |value| per tensor, infinite where a value is NaN; for the scores inside an Attention node an upper
        bound. Largest first.

    Raises:
        ContractError: The graph cannot be read or run, or the type of a tensor cannot be told.
    """
    graph, observed = load_observed(case.graphs[name], case, threads)
    spec = case.spec(name, config)
    spec = GraphSpec(
        name=spec.name,
        inputs=spec.inputs,
        outputs=(*spec.outputs, TensorSpec(name=OUTPUT, dtype="float32", dims=(observed.count,))),
        aliases=spec.aliases,
    )
    largest = np.zeros(observed.count, np.float32)
    batch = min(batch, _affordable_windows(case, name, config, windows.length))
    for start in range(0, windows.count, batch):
        ids = windows.inputs[start : start + batch]
        sizes = {"batch": len(ids), "seq": ids.shape[1], "capacity": case.capacity or windows.length}
        bound = BoundGraph(graph, spec, sizes, new_caches(spec, sizes))
        for _ in _step_calls(bound, ids) if name == STEP else _prefill_calls(bound, ids):
            largest = np.maximum(largest, bound.read(OUTPUT))  # maximum, unlike fmax, keeps NaN
    found = observed.largest(np.nan_to_num(largest, nan=np.inf))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _affordable_windows(case: ParityCase, name: str, config: ModelConfig, length: int) -> int:
    """Windows per call whose observed values, all alive at once in FP32, stay within ``_OBSERVED_BYTES``."""
    seq, passes = (1, 1) if name == STEP else (length, case.unroll)
    keys = (case.capacity or length) + (0 if name == STEP else seq)
    # Per layer some twelve tensors as wide as the model, three as wide as its MLP and four of attention's scores.
    values = 12 * config.hidden_size + 3 * config.intermediate_size + 4 * config.num_attention_heads * keys
    return max(1, _OBSERVED_BYTES // (4 * values * config.num_hidden_layers * passes * seq))


def _step_calls(bound: BoundGraph, ids: np.ndarray) -> Iterator[None]:
    for position in range(ids.shape[1]):
        bound.run(input_ids=ids[:, position : position + 1], position=np.full(len(ids), position))
        yield
        if bound.has("next_state"):
            bound.set(state=bound.read("next_state"))


def _prefill_calls(bound: BoundGraph, ids: np.ndarray) -> Iterator[None]:
    bound.run(input_ids=ids, length=np.full(len(ids), ids.shape[1]))
    yield


def load_observed(path: Path, case: ParityCase, threads: int) -> tuple[OrtGraph, Observed]:
    """Load a graph with one more output, the largest |value| of each of its FP16 tensors.

    Returns:
        The graph, and what the entries of that output are.

    Raises:
        ContractError: The file cannot be read or loaded, or the type of a tensor cannot be told.
    """
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
    return OrtGraph(path, session, "cpu", threads=threads), observed
