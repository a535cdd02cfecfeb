"""The layer list: reading the builder's text, and what a list must show for each precision."""

from __future__ import annotations

import pytest

from crt_export.engine.tensorrt.api import Log
from crt_export.engine.tensorrt.builder import ALLOWED_WARNINGS, unexpected_warnings
from crt_export.engine.tensorrt.layers import (
    check_layers,
    is_int8_gemm,
    layers_from_text,
    summarize_layers,
)
from crt_export.errors import BuildError


def tensor(name: str, dims: str, dtype: str) -> str:
    return f"{{ Name: {name}, Dimensions: [{dims}], Strides: [1], Datatype: {dtype}, Format: (Linear) Row major }}"


def line(name: str, kind: str, inputs: list[str], constants: list[str], outputs: list[str], nodes: str) -> str:
    """One layer as TensorRT-RTX 1.7.1 logs it."""
    lists = "".join(
        f"{title}: [ {', '.join(tensors)}], " if tensors else f"{title}: [], "
        for title, tensors in (("Inputs", inputs), ("Constants", constants), ("Outputs", outputs))
    )
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes.split())
    return f"Name: {name}, LayerType: {kind}, {lists}TacticName: kernel_7, StreamId: 0, Metadata: {metadata}"


def gemm(
    operand: str, weight: str, output: str, *, node: str = "up", name: str = "up_myl0_2", kind: str = "gemm"
) -> str:
    constants = [tensor("w", "128,512", weight), tensor("alpha", "1", "Float")]
    return line(name, kind, [tensor("x", "-1,128", operand)], constants, [tensor("y", "-1,512", output)], node)


LOOKUP = line(
    "__myl_CastGath_myl0_1", "kgen", [tensor("ids", "-1,1", "Int64")], [], [tensor("x", "-1,128", "Half")], "e"
)
ATTENTION = line(
    "_gemv_mha_v1_myl0_7", "kgen", [tensor("q", "-1,4,1,32", "Half"), tensor("k", "-1,4,96,32", "Half")], [],
    [tensor("o", "-1,1,32", "Half")], "attention",
)  # fmt: skip


def listing(*lines: str) -> str:
    bindings = "\n\nI/O Tensors:\n Name: ids, IOMode: Input, DataType: Int64, Dimensions: [-1,1]\n"
    return "Layers:\n" + "\n".join(lines) + bindings


def test_every_field_of_a_layer_is_read() -> None:
    layers = layers_from_text(listing(LOOKUP, gemm("Int8", "Int8", "Float", node="up up_DequantizeLinear"), ATTENTION))
    assert [layer.kind for layer in layers] == ["kgen", "gemm", "kgen"]
    assert [layer.is_gemm for layer in layers] == [False, True, True]
    up = layers[1]
    assert up.name == "up_myl0_2"
    assert [(t.name, t.dtype, t.dims) for t in up.inputs] == [("x", "int8", (-1, 128))]
    assert [t.dims for t in up.constants] == [(128, 512), (1,)]
    assert [t.dtype for t in up.outputs] == ["float32"]
    assert up.onnx_nodes == ("up", "up_DequantizeLinear")
    assert up.tactic == "kernel_7"
    assert summarize_layers(layers) == {
        "kgen": 1,
        "gemm int8 -> float32": 1,
        "attention float16 -> float16": 1,
    }


def test_the_field_of_tensorrt_10_is_read_too() -> None:
    text = (
        "Layers:\nName: up, LayerType: gemm, Inputs: [ { Name: x, Location: Device, Dimensions: [1,128], "
        "Format/Datatype: Row major linear FP16 format }], Outputs: [ { Name: y, Location: Device, "
        "Dimensions: [1,512], Format/Datatype: Half }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: up]\n\n"
        "Bindings:\nx\ny\n"
    )
    (layer,) = layers_from_text(text)
    assert [tensor.dtype for tensor in (*layer.inputs, *layer.outputs)] == ["float16", "float16"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no layer in the builder's detailed log"),
        (listing(), "no layer in the builder's detailed log"),
        (listing(LOOKUP, "Layer(gemm): up, Tactic: 0x1"), "no 'Name: ..., LayerType: ...'"),
        (listing(gemm("Half", "Half", "Quarter")), "known datatype"),
        (listing("Name: up, LayerType: gemm, Metadata: "), "no Inputs and Outputs"),
    ],
)
def test_a_list_that_is_not_understood_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(BuildError, match="layer list is not understood") as failure:
        layers_from_text(text)
    assert complaint in str(failure.value)


@pytest.mark.parametrize("name", ["__myl_FcAddDivErfAddMulMul_myl0_2", "__myl_FcAdd_myl0_14", "_gemm_mha_v2_myl0_10"])
def test_a_fused_product_counts_as_a_gemm(name: str) -> None:
    (layer,) = layers_from_text(listing(gemm("Float", "Float", "Float", name=name, kind="runtime_fusion")))
    assert layer.is_gemm
    with pytest.raises(BuildError, match=f"{name} is an FP32 GEMM"):
        check_layers([layer], precision="fp16", linears=["up"])


def test_good_lists_pass() -> None:
    half = layers_from_text(listing(LOOKUP, gemm("Half", "Half", "Half"), ATTENTION))
    check_layers(half, precision="fp16", linears=["up"], products=["attention"])
    int8 = layers_from_text(listing(LOOKUP, gemm("Int8", "Int8", "Float"), ATTENTION))
    check_layers(int8, precision="w8a8", linears=["up"], products=["attention"])
    assert [is_int8_gemm(layer) for layer in int8] == [False, True, False]


def test_a_residual_read_in_float_is_no_fp32_gemm() -> None:
    inputs = [tensor("h", "-1,512", "Float"), tensor("x", "-1,128", "Half")]
    fused = line(
        "__myl_FcAddAdd_myl0_3", "runtime_fusion", inputs, [tensor("w", "128,512", "Half")],
        [tensor("y", "-1,512", "Float")], "up",
    )  # fmt: skip
    check_layers(layers_from_text(listing(fused)), precision="fp16", linears=["up"])


@pytest.mark.parametrize(
    ("precision", "lines", "complaints"),
    [
        ("fp16", [gemm("Float", "Float", "Float")], ["up_myl0_2 is an FP32 GEMM, for ONNX nodes up"]),
        (
            "w8a8",
            [gemm("Float", "Float", "Float")],
            ["up_myl0_2 is an FP32 GEMM", "linear up is computed by up_myl0_2"],
        ),
        ("w8a8", [gemm("Half", "Half", "Half")], ["linear up is computed by up_myl0_2 (gemm float16 -> float16)"]),
        ("w8a8", [gemm("Half", "Int8", "Half")], ["linear up is computed by up_myl0_2"]),
        ("w8a8", [gemm("Int8", "Int8", "Half")], ["up_myl0_2 is an INT8 GEMM with a Half output"]),
        ("fp16", [LOOKUP], ["no GEMM layer computes ONNX node up (layers that mention it: none)"]),
        ("fp16", [gemm("Half", "Half", "Half", node="down")], ["no GEMM layer computes ONNX node up"]),
        ("fp16", [gemm("Half", "Half", "Half", name="x", kind="kgen")], ["(layers that mention it: x)"]),
    ],
)
def test_a_bad_list_is_refused_by_name(precision: str, lines: list[str], complaints: list[str]) -> None:
    with pytest.raises(BuildError) as failure:
        check_layers(layers_from_text(listing(*lines)), precision=precision, linears=["up"])
    for complaint in complaints:
        assert complaint in str(failure.value)


def test_all_faults_are_listed_at_once() -> None:
    bad = [gemm("Int8", "Int8", "Half", node=f"n{i}", name=f"layer{i}") for i in range(3)]
    with pytest.raises(BuildError, match="3 problems"):
        check_layers(layers_from_text(listing(*bad)), precision="w8a8", linears=["n0", "n1", "n2"])


def test_attention_must_be_found_too() -> None:
    layers = layers_from_text(listing(gemm("Half", "Half", "Half")))
    with pytest.raises(BuildError, match="no GEMM layer computes ONNX node attention"):
        check_layers(layers, precision="fp16", linears=["up"], products=["attention"])


@pytest.mark.parametrize(
    ("warning", "allowed"),
    [
        ("ModelImporter.cpp:1071: Make sure input input_ids has Int64 binding.", True),
        ("ModelImporter.cpp:1303: Make sure output next_token has Int64 binding.", True),
        ("Make sure input position has Int64 binding.", True),
        ("Unused Input: spare", False),
        (
            "[RemoveDeadLayers] Input Tensor spare is unused or used only at compile-time, but is not being removed.",
            False,
        ),
        ("Make sure input position has Int64 binding. Unused Input: position", False),
    ],
)
def test_only_listed_warnings_are_allowed(warning: str, allowed: bool) -> None:
    log = Log()
    log.warnings.append(warning)
    assert unexpected_warnings(log) == ([] if allowed else [warning])


def test_every_allowed_warning_has_its_reason() -> None:
    assert all(len(reason) > 20 for reason in ALLOWED_WARNINGS.values())
