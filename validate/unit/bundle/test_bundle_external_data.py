"""The reader that finds every file an ONNX graph points at."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto

from crt_export.bundle import external_tensors
from crt_export.bundle.external_data import _CHILDREN, _MAX_DEPTH
from crt_export.errors import BundleError

NESTED = {  # the message types on the way to a TensorProto, by this reader's name for them
    "Model": onnx.ModelProto,
    "TrainingInfo": onnx.TrainingInfoProto,
    "Graph": onnx.GraphProto,
    "Function": onnx.FunctionProto,
    "Node": onnx.NodeProto,
    "Attribute": onnx.AttributeProto,
    "SparseTensor": onnx.SparseTensorProto,
    "Tensor": onnx.TensorProto,
}


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def locations(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [tensor.location for tensor in external_tensors(path)]


def varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def test_field_numbers_cover_every_way_to_a_tensor_in_onnx() -> None:
    names = {message.DESCRIPTOR.name: name for name, message in NESTED.items()}
    expected = {
        name: {
            one.number: names[one.message_type.name]
            for one in message.DESCRIPTOR.fields
            if one.message_type and one.message_type.name in names
        }
        for name, message in NESTED.items()
    }
    expected.pop("Tensor")
    assert expected == _CHILDREN


def test_finds_tensors_wherever_onnx_allows_them(tmp_path: Path) -> None:
    model = ModelProto(ir_version=10)
    model.graph.initializer.append(external("weight", "initializer"))
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external("values", "sparse-values"))
    sparse.indices.CopyFrom(external("indices", "sparse-indices"))
    node = model.graph.node.add(op_type="Constant")
    node.attribute.add(name="value", type=AttributeProto.TENSOR).t.CopyFrom(external("t", "attribute"))
    node.attribute.add(name="values").tensors.append(external("t", "attribute-list"))
    node.attribute.add(name="sparse").sparse_tensor.values.CopyFrom(external("t", "attribute-sparse"))
    body = GraphProto()
    body.initializer.append(external("inner", "subgraph"))
    node.attribute.add(name="body").g.CopyFrom(body)
    node.attribute.add(name="bodies").graphs.append(body)
    function = model.functions.add(name="f")
    function.node.add(op_type="If").attribute.add(name="then").g.CopyFrom(body)
    function.attribute_proto.add(name="default").t.CopyFrom(external("t", "function-default"))
    model.training_info.add().algorithm.CopyFrom(body)
    found = locations(tmp_path / "m.onnx", model.SerializeToString())
    assert sorted(set(found)) == [
        "attribute",
        "attribute-list",
        "attribute-sparse",
        "function-default",
        "initializer",
        "sparse-indices",
        "sparse-values",
        "subgraph",
    ]
    assert found.count("subgraph") == 4


def test_finds_what_onnx_itself_writes_and_nothing_in_an_inline_model(tmp_path: Path) -> None:
    values = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [values])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "inline.onnx"))
    assert external_tensors(tmp_path / "inline.onnx") == ()
    onnx.save(
        onnx.helper.make_model(graph),
        str(tmp_path / "m.onnx"),
        save_as_external_data=True,
        location="all.weights",
        size_threshold=0,
    )
    (found,) = external_tensors(tmp_path / "m.onnx")
    assert (found.tensor, found.location) == ("w", "all.weights")


def test_a_location_counts_even_if_the_tensor_says_it_is_inline(tmp_path: Path) -> None:
    tensor = external("w", "/etc/passwd")
    tensor.data_location = TensorProto.DEFAULT
    model = ModelProto(graph=GraphProto(initializer=[tensor]))
    assert locations(tmp_path / "m.onnx", model.SerializeToString()) == ["/etc/passwd"]


def test_every_one_of_several_locations_counts(tmp_path: Path) -> None:
    tensor = external("w", "harmless")
    tensor.external_data.add(key="location", value="../harmful")
    model = ModelProto(graph=GraphProto(initializer=[tensor]))
    assert locations(tmp_path / "m.onnx", model.SerializeToString()) == ["harmless", "../harmful"]


def test_external_tensor_without_location_is_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_location=TensorProto.EXTERNAL)
    with pytest.raises(BundleError, match=r"tensor 'w' is external but names no location"):
        locations(tmp_path / "m", ModelProto(graph=GraphProto(initializer=[tensor])).SerializeToString())


HUGE = 1 << 62
HOSTILE = {
    "field claims more than the file has": (varint(7 << 3 | 2) + varint(HUGE), "claims 4611686018427387904"),
    "inner field claims more than its parent": (
        field(7, varint(5 << 3 | 2) + varint(1 << 20)) + b"\x08\x01" * (1 << 20),
        "claims 1048576 bytes, 0 are left",
    ),
    "location of two million bytes": (
        field(7, field(5, field(13, field(1, b"location") + field(2, b"x" * 2_000_000)))),
        "2000000 bytes",
    ),
    "name that is not UTF-8": (field(7, field(5, field(8, b"\xff\xfe"))), "not UTF-8"),
    "number longer than 10 bytes": (b"\xff" * 11, "longer than 10 bytes"),
    "file ends inside a number": (b"\x80", "ends inside a number"),
    "tag beyond 32 bits": (varint(1 << 40), "impossible field tag"),
    "field number 0": (b"\x00\x00", "impossible field tag"),
    "group": (b"\x0b\x0c", "unsupported wire type 3"),
    "text": (b"this is not a protobuf", "not a usable ONNX file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_refused_without_a_large_allocation(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match=message):
            external_tensors(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 500_000


def test_nesting_is_bounded(tmp_path: Path) -> None:
    content = b""
    for _ in range(_MAX_DEPTH):
        content = field(1, field(5, field(6, content)))
    with pytest.raises(BundleError, match="nested more than"):
        locations(tmp_path / "m.onnx", field(7, content))


def test_large_inline_data_is_skipped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    size = 1 << 30
    tensor = varint(9 << 3 | 2) + varint(size)  # raw_data of 1 GiB
    after = external("late", "after.weights").SerializeToString()
    with path.open("wb") as stream:
        graph_size = 1 + len(varint(len(tensor) + size)) + len(tensor) + size + len(field(5, after))
        stream.write(varint(7 << 3 | 2) + varint(graph_size))
        stream.write(varint(5 << 3 | 2) + varint(len(tensor) + size) + tensor)
        stream.seek(size, 1)  # a hole: takes no room on the disk
        stream.write(field(5, after))
    tracemalloc.start()
    try:
        assert [tensor.location for tensor in external_tensors(path)] == ["after.weights"]
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def mutations(content: bytes, count: int) -> Iterator[bytes]:
    generator = random.Random(0)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(generator.randint(1, 2)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        yield bytes(changed)


def test_whatever_onnx_would_load_is_seen_also_in_damaged_files(tmp_path: Path) -> None:
    model = ModelProto(ir_version=10, graph=GraphProto(initializer=[external("w", "a"), external("v", "b")]))
    model.graph.node.add(op_type="Constant").attribute.add(name="value").t.CopyFrom(external("t", "c"))
    loaded = 0
    for content in mutations(model.SerializeToString(), 700):
        try:
            expected = ModelProto.FromString(content)
        except Exception:  # protobuf's error class is not public
            expected = None
        try:
            seen = locations(tmp_path / "m.onnx", content)
        except BundleError:
            continue  # refusing more than protobuf does is safe
        if expected is None:
            continue
        loaded += 1
        tensors = [*expected.graph.initializer]
        tensors += [attribute.t for node in expected.graph.node for attribute in node.attribute]
        needed = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
        assert needed <= set(seen)
    assert loaded > 100


def test_link_and_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(ModelProto().SerializeToString())
    (tmp_path / "link.onnx").symlink_to(tmp_path / "m.onnx")
    for name in ("link.onnx", "absent.onnx"):
        with pytest.raises(BundleError, match="cannot open the graph"):
            external_tensors(tmp_path / name)
