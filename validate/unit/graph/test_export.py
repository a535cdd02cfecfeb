"""Exported graphs compute what the model computes, under the contract and with shared weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from crt_export.checkpoint import load_checkpoint
from crt_export.engine.ort import import_onnxruntime
from crt_export.errors import BuildError, ContractError, InputError, UnsupportedError
from crt_export.graph import weights as weights_module
from crt_export.graph.contract import check_contract
from crt_export.graph.export import GraphExporter, export_graph
from crt_export.graph.weights import is_weight, write_graph, write_weights
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint
from crt_export.spec import graph_names, graph_spec

pytestmark = pytest.mark.slow

SNAPSHOTS = Path(__file__).resolve().parents[3] / "graphs" / "snapshots"
UNROLL = 3
CAPACITY = 16
KINDS = {
    "crt-interleaved-window": {"num_hidden_layers": 2, "sliding_window": 5},
    "crt-half-tied-70": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 140,
        "rope_layout": "half",
        "tie_word_embeddings": True,
        "vocab_size": 300,
    },
    "transformer": {"model_type": "transformer", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32},
}
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Exported:
    """The graphs of one model on disk, loaded in ONNX Runtime, beside the model they came from."""

    model: LanguageModel
    folder: Path
    graphs: dict[str, ir.Model]
    sessions: dict[str, Any]

    def run(self, name: str, **inputs: np.ndarray) -> Arrays:
        session = self.sessions[name]
        known = {value.name for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        values = session.run(names, {k: v for k, v in inputs.items() if k in known})
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}

    def caches(self, batch: int) -> Arrays:
        caches = enumerate(self.model.carried.caches)
        sides = [(i, spec, side) for i, spec in caches for side in ("key", "value")]
        return {
            f"past_key_values.{i}.{side}": np.zeros((batch, spec.heads, CAPACITY, spec.head_dim), np.float32)
            for i, spec, side in sides
        }

    def start(self, batch: int, seq: int) -> Arrays:
        hidden = self.model.config.hidden_size
        return {
            "position": np.zeros(batch, np.int64),
            "state": np.zeros((batch, 1, hidden), np.float32),
            "hidden": np.zeros((batch, seq, hidden), np.float32),
            **self.caches(batch),
        }


def carried(outputs: Arrays) -> Arrays:
    """Outputs of one call as the inputs of the next."""
    renamed = {name.replace("present_", "past_").removeprefix("next_"): value for name, value in outputs.items()}
    return {name: value for name, value in renamed.items() if name.startswith("past_") or name in ("state", "position")}


def _kind(name: str) -> object:
    """Session tests hold a windowed model of two layers against PyTorch: this one is left to make evidence."""
    return pytest.param(name, marks=[pytest.mark.evidence] if "window" in name else [])


@pytest.fixture(scope="module", params=[_kind(name) for name in KINDS], ids=str)
def exported(
    request: pytest.FixtureRequest,
    make_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    shared_traces: None,
) -> Exported:
    model = model_from_checkpoint(load_checkpoint(make_checkpoint(**KINDS[request.param])))
    folder = tmp_path_factory.mktemp("graphs")
    exporter = GraphExporter(model)
    graphs = {name: exporter.graph(name, unroll=UNROLL) for name in graph_names(model.carried)}
    weights = write_weights(graphs, folder / "fp32.weights")
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sessions = {}
    for name, graph in graphs.items():
        write_graph(graph, folder / f"{name}.onnx", weights)
        sessions[name] = import_onnxruntime().InferenceSession(
            folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
        )
    return Exported(model=model, folder=folder, graphs=graphs, sessions=sessions)


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 9))


def test_graphs_of_a_model(exported: Exported) -> None:
    has_pass = "prefill_pass" in exported.graphs
    assert has_pass == exported.model.config.carried.iterated
    assert {"step", "prefill", "head"} <= set(exported.graphs)


def test_step_chain_is_the_recurrence(exported: Exported, ids: np.ndarray) -> None:
    decoded, _ = exported.model.sequential(torch.from_numpy(ids))
    expected = exported.model.head(decoded.hidden).numpy()
    feed = exported.start(3, 1)
    for t in range(ids.shape[1]):
        out = exported.run("step", input_ids=ids[:, t : t + 1], **feed)
        np.testing.assert_allclose(out["logits"], expected[:, t], rtol=1e-6, atol=2e-5)  # tied logits reach 60
        np.testing.assert_array_equal(out["next_token"][:, 0], out["logits"].argmax(-1))
        np.testing.assert_array_equal(out["next_position"], t + 1)
        feed = carried(out)


def test_prefill_takes_rows_of_different_length(exported: Exported, ids: np.ndarray) -> None:
    """Also a row of no tokens: its state is handed through."""
    length = np.array([9, 4, 0])
    feed = exported.start(3, 9)
    feed["state"][:] = np.random.default_rng(1).normal(size=feed["state"].shape)
    out = exported.run("prefill", input_ids=ids, length=length, **feed)
    np.testing.assert_array_equal(out["next_position"], length)
    for row in range(2):
        state = exported.model.start(1)
        for values in state.states.values():
            values[:] = torch.from_numpy(feed["state"][row])
        passes = UNROLL if exported.model.config.carried.iterated else 1
        done, _, residual = exported.model.unroll(torch.from_numpy(ids[row : row + 1, : length[row]]), passes, state)
        h = done.hidden
        np.testing.assert_allclose(out["next_hidden"][row, : length[row]], h[0].numpy(), atol=2e-5)
        np.testing.assert_allclose(out["logits"][row], exported.model.head(h[0, -1]).numpy(), atol=2e-5)
        if exported.model.config.carried.iterated:
            np.testing.assert_allclose(out["next_state"][row, 0], h[0, -1].numpy(), atol=2e-5)
            np.testing.assert_allclose(out["residual"][row], residual[0].numpy(), atol=2e-5)
    if exported.model.config.carried.iterated:
        np.testing.assert_array_equal(out["next_state"][2], feed["state"][2])
        assert out["residual"][2] == 0


def test_prefill_hands_over_to_steps(exported: Exported, ids: np.ndarray) -> None:
    model, passes = exported.model, UNROLL if exported.model.config.carried.iterated else 1
    out = exported.run("prefill", input_ids=ids[:, :5], length=np.full(3, 5), **exported.start(3, 5))
    _, state, _ = model.unroll(torch.from_numpy(ids[:, :5]), passes)
    decoded, _ = model.sequential(torch.from_numpy(ids[:, 5:]), state)
    expected = model.head(decoded.hidden).numpy()
    for t in range(4):
        out = exported.run("step", input_ids=ids[:, 5 + t : 6 + t], **carried(out))
        np.testing.assert_allclose(out["logits"], expected[:, t], atol=3e-5)


def test_second_chunk_continues_at_its_position(exported: Exported, ids: np.ndarray) -> None:
    """Chunks no longer than K are exact, so two of them equal the recurrence."""
    decoded, _ = exported.model.sequential(torch.from_numpy(ids[:, :6]))
    first = exported.run("prefill", input_ids=ids[:, :3], length=np.full(3, 3), **exported.start(3, 3))
    zeros = np.zeros_like(first["next_hidden"])
    second = exported.run("prefill", input_ids=ids[:, 3:6], length=np.full(3, 3), hidden=zeros, **carried(first))
    np.testing.assert_allclose(second["next_hidden"], decoded.hidden[:, 3:].numpy(), atol=3e-5)


def test_repeated_pass_is_the_unrolled_prefill(exported: Exported, ids: np.ndarray) -> None:
    if not exported.model.config.carried.iterated:
        pytest.skip("a plain transformer has one pass")
    feed = {"input_ids": ids, "length": np.array([9, 4, 0]), **exported.start(3, 9)}
    expected = exported.run("prefill", **feed)
    out: Arrays = {}
    for _ in range(UNROLL):
        out = exported.run("prefill_pass", **feed)
        feed["hidden"] = out["next_hidden"]
    for name, value in expected.items():
        np.testing.assert_array_equal(out[name], value, err_msg=name)


def test_head_gives_the_logits_of_every_position(exported: Exported) -> None:
    hidden = np.random.default_rng(2).normal(size=(2, 5, exported.model.config.hidden_size)).astype(np.float32)
    out = exported.run("head", hidden=hidden)
    np.testing.assert_allclose(out["logits"], exported.model.head(torch.from_numpy(hidden)).numpy(), atol=2e-5)


def test_residual_counts_real_tokens_only_and_keeps_nan(exported: Exported, ids: np.ndarray) -> None:
    if not exported.model.config.carried.iterated:
        pytest.skip("a plain transformer has no residual")
    length, feed = np.array([9, 4, 9]), exported.start(3, 9)
    calm = exported.run("prefill_pass", input_ids=ids, length=length, **feed)["residual"]
    feed["hidden"][0, 2] = np.nan
    feed["hidden"][1, 7] = 1000.0  # beyond this row's length
    out = exported.run("prefill_pass", input_ids=ids, length=length, **feed)["residual"]
    assert np.isnan(out[0])
    np.testing.assert_array_equal(out[1:], calm[1:])


def test_all_graphs_share_one_weight_file(exported: Exported) -> None:
    """Same name, offset, length and bytes of every weight in every graph; nothing else is external."""
    seen: dict[str, tuple[object, ...]] = {}
    data = (exported.folder / "fp32.weights").read_bytes()
    for name in exported.graphs:
        graph = ir.load(exported.folder / f"{name}.onnx")
        for weight, value in graph.graph.initializers.items():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                assert not is_weight(weight), f"{name}: {weight} is stored inline"
                continue
            assert tensor.offset is not None
            assert tensor.length is not None
            digest = hashlib.sha256(data[tensor.offset : tensor.offset + tensor.length]).hexdigest()
            entry = (tensor.location, tensor.offset, tensor.length, digest)
            assert seen.setdefault(weight, entry) == entry, f"{name}: {weight}"
    config, model = exported.model.config, exported.model
    assert set(seen) == {parameter for parameter, _ in model.named_parameters()} | {"rope_cos", "rope_sin"}
    assert len(data) < 1.1 * sum(p.nbytes for p in model.parameters()) + 8 * config.max_position_embeddings * (
        config.head_dim
    ) + 4096 * len(seen)


def test_weights_are_right_hand_sides_as_in_out(exported: Exported) -> None:
    """What quantisers need to see: MatMul(x, W) for every linear of every pass."""
    linears = 6 * exported.model.config.num_hidden_layers + 2 * exported.model.config.carried.iterated
    for name, graph in exported.graphs.items():
        found = [
            node.inputs[1].name
            for node in graph.graph
            if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].is_initializer()
        ]
        passes = UNROLL if name == "prefill" and exported.model.config.carried.iterated else 1
        assert len(found) == (1 if name == "head" else linears * passes + 1), name
        for weight in set(found):
            assert weight is not None
            assert weight.endswith(".weight")
            shape = tuple(exported.model.state_dict()[weight].shape)
            assert tuple(graph.graph.initializers[weight].shape or ()) == shape


def printed(graph: ir.Model) -> str:
    """One line per node: operator, weights it reads, what it delivers; other names are the exporter's own."""
    body = graph.graph
    lines = [f"{side} {v.name}: {v.dtype} {v.shape}" for side in ("inputs", "outputs") for v in getattr(body, side)]
    for node in body:
        weights = [v.name for v in node.inputs if v is not None and v.name and v.is_initializer() and is_weight(v.name)]
        results = [v.name if v.is_graph_output() else str(v.dtype) for v in node.outputs]
        lines.append(" ".join([node.op_type, *weights, "->", *map(str, results)]))
    return "\n".join(lines) + "\n"


def test_graphs_print_as_committed(exported: Exported) -> None:
    """A change of exporter or passes shows as a readable diff; if meant, set CRT_EXPORT_UPDATE_SNAPSHOTS=1 once."""
    if not exported.model.config.tie_word_embeddings:
        pytest.skip("the tied CRT with rope layout half is the one that is committed")
    for name, graph in exported.graphs.items():
        found, path = printed(graph), SNAPSHOTS / f"{name}.txt"
        if os.environ.get("CRT_EXPORT_UPDATE_SNAPSHOTS") == "1":
            path.write_text(found, encoding="utf-8")
        assert found == path.read_text(encoding="utf-8"), f"{path.name} differs"


def test_nothing_of_the_exporting_machine_is_left(exported: Exported) -> None:
    for name in exported.graphs:
        content = (exported.folder / f"{name}.onnx").read_bytes()
        assert b".py" not in content
        assert b"site-packages" not in content


def test_equal_weights_keep_their_own_names(make_checkpoint: Callable[..., Path]) -> None:
    """Untrained norms and a zero correction hold equal values; graphs must still name each weight.

    The size is this test's own: the trace of another model would say nothing.
    """

    def flatten(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "norm" in name or name.startswith("correction.down"):
                tensor.fill_(1.0 if name.endswith("norm.weight") else 0.0)

    model = model_from_checkpoint(
        load_checkpoint(make_checkpoint(edit=flatten, num_hidden_layers=1, intermediate_size=40))
    )
    names = set(export_graph(model, "step").graph.initializers)
    assert {parameter for parameter, _ in model.named_parameters()} <= names


def test_fp16_graph_has_fp16_caches_and_float32_borders(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = load_checkpoint(make_checkpoint(num_hidden_layers=1))
    for residual in (torch.float16, torch.float32):
        graph = export_graph(model_from_checkpoint(checkpoint, torch.float16, residual), "step")
        dtypes = {value.name: value.dtype for value in (*graph.graph.inputs, *graph.graph.outputs)}
        assert dtypes["past_key_values.0.key"] == dtypes["present_key_values.0.value"] == ir.DataType.FLOAT16
        assert dtypes["state"] == dtypes["next_state"] == dtypes["logits"] == ir.DataType.FLOAT
        norm_inputs = {n.inputs[0].dtype for n in graph.graph if n.op_type == "LayerNormalization" and n.inputs[0]}
        assert norm_inputs == {ir.DataType.FLOAT16 if residual == torch.float16 else ir.DataType.FLOAT}


def test_contract_names_every_difference(exported: Exported) -> None:
    graph = ir.load(exported.folder / "step.onnx")
    spec = graph_spec("step", exported.model.config, "float32")
    check_contract(graph, spec)
    graph.graph.outputs[0].name = "scores"
    graph.graph.inputs[1].dtype = ir.DataType.INT32
    graph.graph.outputs[-1].shape = ir.Shape(("batch", 1))
    with pytest.raises(ContractError, match=r"[34] problems") as caught:
        check_contract(graph, spec)
    for part in ("scores", "position", "present_key_values"):
        assert part in str(caught.value)


def test_different_weights_under_one_name_are_refused(exported: Exported, tmp_path: Path) -> None:
    other = ir.load(exported.folder / "head.onnx")
    bias = np.ones(exported.model.config.hidden_size, np.float32)
    other.graph.initializers["final_norm.bias"].const_value = ir.tensor(bias, name="final_norm.bias")
    with pytest.raises(BuildError, match=r"final_norm\.bias"):
        write_weights({"step": exported.graphs["step"], "head": other}, tmp_path / "w.weights")


def test_a_graph_with_other_bytes_than_the_weight_file_is_not_written(exported: Exported, tmp_path: Path) -> None:
    step = export_graph(exported.model, "step")
    weights = write_weights({"step": step}, tmp_path / "fp32.weights")
    bias = step.graph.initializers["final_norm.bias"]
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy() + 1, name="final_norm.bias")
    with pytest.raises(BuildError, match=r"final_norm\.bias is not what fp32\.weights holds"):
        write_graph(step, tmp_path / "step.onnx", weights)
    assert not (tmp_path / "step.onnx").exists()


def test_memory_that_graphs_share_is_written_and_hashed_once(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, sizes = GraphExporter(exported.model), []
    graphs = {name: exporter.graph(name) for name in ("step", "head")}
    monkeypatch.setattr(weights_module.np, "array_equal", lambda *arrays: sizes.append(arrays[0].nbytes) or True)
    weights = write_weights(graphs, tmp_path / "fp32.weights")
    for name, graph in graphs.items():
        write_graph(graph, tmp_path / f"{name}.onnx", weights)
    assert sizes == [], "compared with itself"
    assert weights.sha256 == hashlib.sha256(weights.path.read_bytes()).hexdigest(), "hashed while it was written"


@pytest.mark.parametrize("array", [np.arange(12).reshape(3, 4).T, np.ones((2, 2), np.float16)])
def test_content_is_what_onnx_stores(array: np.ndarray) -> None:
    tensor = ir.tensor(array, name="x.weight")
    assert bytes(weights_module._content(tensor)) == array.astype(array.dtype.newbyteorder("<")).tobytes()


def test_unroll_below_one_is_refused(exported: Exported) -> None:
    with pytest.raises(InputError, match="at least 1, found 0"):
        export_graph(exported.model, "prefill", unroll=0)


def test_plain_transformer_has_no_prefill_pass(exported: Exported) -> None:
    if exported.model.config.carried.iterated:
        pytest.skip("this one has it")
    with pytest.raises(UnsupportedError, match="no prefill_pass"):
        export_graph(exported.model, "prefill_pass")
