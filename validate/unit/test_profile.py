from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from crt_export.errors import InputError
from crt_export.profile import DimRange, EngineProfile, list_profiles, load_profile
from crt_export.profile_options import OrtOptions, TensorRTOptions

TRACKED = (
    "ort-cpu-fp32",
    "ort-cpu-int8",
    "ort-cuda-fp16",
    "rtx-sm80-fp16",
    "rtx-sm80-int8",
    "trt-sm80-fp16",
    "trt-sm80-int8",
)


def valid(**changes: Any) -> dict[str, Any]:
    """A TensorRT-RTX profile as TOML gives it; a change to None drops the key."""
    values = {
        "name": "mine",
        "title": "TensorRT-RTX on my GPU",
        "runtime": "tensorrt-rtx",
        "device": "cuda",
        "precision": "fp16",
        "compute_capability": 89,
        "capacity": 512,
        "batch": [1, 1, 2],
        "seq": [1, 16, 128],
    }
    merged = {**values, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def message_of(values: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        EngineProfile.from_dict(values, source="mine.toml")
    return str(caught.value)


def test_every_promised_target_is_tracked_under_its_file_name() -> None:
    assert tuple(profile.name for profile in list_profiles()) == TRACKED


@pytest.mark.parametrize("name", TRACKED)
def test_profile_survives_the_manifest(name: str) -> None:
    profile = load_profile(name)
    assert EngineProfile.from_dict(profile.to_dict()) == profile


def test_rtx_titles_promise_a_compilation_only() -> None:
    for profile in list_profiles():
        if profile.runtime == "tensorrt-rtx":
            assert "compiled for SM 8.0" in profile.title
            assert "A100" in profile.title


def test_defaults_follow_the_precision() -> None:
    assert EngineProfile.from_dict(valid()).residual_dtype == "float16"
    cpu = valid(runtime="onnxruntime", device="cpu", precision="w8", compute_capability=None)
    profile = EngineProfile.from_dict(cpu)
    assert (profile.residual_dtype, profile.cache_dtype, profile.options) == (
        "float32",
        "float32",
        OrtOptions(),
    )
    assert (profile.unroll, profile.attention, profile.threads, profile.compiled) == (None, "auto", 0, False)


def test_ranges_have_names() -> None:
    assert EngineProfile.from_dict(valid()).seq == DimRange(min=1, opt=16, max=128)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "My Target"}, "name must be"),
        ({"name": "nul"}, "name 'nul' contains 'nul', which is a device on Windows"),
        ({"name": "com1.fp32"}, "which is a device on Windows"),
        ({"name": "cpu."}, "ends in a dot"),
        ({"name": "fp16"}, "name of a precision"),
        ({"title": " "}, "title must be"),
        (
            {"runtime": "openvino"},
            "runtime must be one of onnxruntime, tensorrt, tensorrt-rtx, found 'openvino'",
        ),
        ({"device": "cpu"}, "tensorrt-rtx does not run on cpu"),
        ({"precision": "int4"}, "precision must be one of"),
        ({"precision": "w8"}, "runs fp16, w8a8, not w8"),
        ({"compute_capability": None}, "compute_capability of a tensorrt-rtx profile must be"),
        ({"compute_capability": 90}, "75, 80, 86, 89, 120, 121"),
        ({"compute_capability": 8.9}, "found 8.9"),
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"capacity": True}, "capacity must be at least 1"),
        ({"capacity": 64}, "seq may not exceed the capacity of 64 tokens, but its largest size is 128"),
        ({"batch": [0, 1, 1]}, "batch must be [min, opt, max], each at least 1"),
        ({"batch": [1, 4]}, "batch must be [min, opt, max]"),
        ({"seq": [1, 64, 32]}, "seq must rise"),
        ({"seq": 5}, "seq must be [min, opt, max]"),
        ({"unroll": 0}, "unroll must be at least 1"),
        ({"runtime": ["tensorrt"]}, "runtime must be one of"),
        ({"threads": -1}, "threads must be 0"),
        ({"threads": 1_000_000}, "at most 1024"),
        ({"threads": 4}, "threads is for device cpu"),
        ({"attention": "flash"}, "attention must be one of"),
        ({"residual_dtype": "bfloat16"}, "residual_dtype must be one of"),
        ({"options": 3}, "options must be a table"),
        ({"options": {"optimization_level": 6}}, "optimization_level must be 0 to 5"),
        ({"options": {"workspace_mib": -1}}, "workspace_mib must be 0 or more"),
        ({"options": {"ampere_plus": "yes"}}, "ampere_plus must be true or false"),
        ({"options": {"ampere_plus": True}}, "does not apply to tensorrt-rtx"),
        ({"options": {"spinning": True}}, "unknown key 'options.spinning'"),
    ],
)
def test_impossible_value_is_refused_by_name(changes: dict[str, Any], expected: str) -> None:
    assert expected in message_of(valid(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"precision": "w8", "residual_dtype": "float16"},
            "residual_dtype must be float32 with precision w8",
        ),
        ({"compute_capability": 80}, "compute_capability is for TensorRT, not for onnxruntime"),
        ({"attention": "fused"}, "attention is for TensorRT"),
        ({"options": {"graph_optimization": "most"}}, "graph_optimization must be one of"),
        ({"options": {"disabled_optimizers": "MatMulAddFusion"}}, "disabled_optimizers must be a list"),
        ({"options": {"disabled_optimizers": ["a;b"]}}, "disabled_optimizers must be a list"),
        ({"options": {"spinning": 1}}, "spinning must be true or false"),
        ({"options": {"huge_pages": "no"}}, "huge_pages must be true or false"),
        ({"device": "cuda", "precision": "w8"}, "onnxruntime on cuda runs fp32, fp16, not w8"),
    ],
)
def test_impossible_onnxruntime_value_is_refused_by_name(changes: dict[str, Any], expected: str) -> None:
    base = {"runtime": "onnxruntime", "device": "cpu", "precision": "fp32", "compute_capability": None}
    assert expected in message_of(valid(**{**base, **changes}))


def test_all_problems_are_reported_at_once() -> None:
    values = valid(
        title=None, capacity=0, batch=[2, 1, 1], sequence=[1, 2, 3], runtme="x", options={"worksapce_mib": 1}
    )
    message = message_of(values)
    assert "mine.toml: 6 problems" in message
    for problem in (
        "missing key 'title'",
        "capacity",
        "batch",
        "unknown key 'sequence'",
        "'runtme' (did you mean 'runtime'?)",
        "'options.worksapce_mib' (did you mean 'workspace_mib'?)",
    ):
        assert problem in message


def test_an_empty_file_names_every_missing_key() -> None:
    message = message_of({})
    for key in ("name", "title", "runtime", "device", "precision", "capacity", "batch", "seq"):
        assert f"missing key '{key}'" in message


def test_unknown_target_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(InputError) as caught:
        load_profile("ort-cpu-fp23")
    assert "did you mean ort-cpu-fp32?" in str(caught.value)
    assert all(name in str(caught.value) for name in TRACKED)


def test_users_own_file_is_loaded_and_named_after_itself(tmp_path: Path) -> None:
    lines = (f"{key} = {value!r}" for key, value in valid(name=None).items())
    path = tmp_path / "my-gpu.toml"
    path.write_text("\n".join(lines) + "\n[options]\noptimization_level = 5\n", encoding="utf-8")
    profile = load_profile(str(path))
    assert (profile.name, profile.compute_capability) == ("my-gpu", 89)
    assert profile.options == TensorRTOptions(optimization_level=5)


def test_unusable_files_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml cannot be read"):
        load_profile(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ", encoding="utf-8")
    with pytest.raises(InputError, match=r"broken\.toml is not valid TOML"):
        load_profile(broken)
    for text in ("threads = " + "[" * 50_000, "threads = " + "9" * 5000, "threads = {a = " * 5000):
        broken.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"engine profile .*broken\.toml"):
            load_profile(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        load_profile(broken)


def test_replace_cannot_make_an_impossible_profile() -> None:
    with pytest.raises(InputError, match="seq may not exceed"):
        dataclasses.replace(load_profile("rtx-sm80-fp16"), capacity=8)
    with pytest.raises(InputError, match="must be TensorRTOptions"):
        dataclasses.replace(load_profile("rtx-sm80-fp16"), options=OrtOptions())


def test_smaller_capacity_shrinks_the_prefill_chunk() -> None:
    profile = load_profile("rtx-sm80-fp16").with_capacity(100)
    assert (profile.capacity, profile.seq) == (100, DimRange(1, 64, 100))
    assert load_profile("rtx-sm80-fp16").with_capacity(4096).seq.max == 256
    with pytest.raises(InputError, match="capacity must be at least 1"):
        profile.with_capacity(0)


def test_options_refuse_impossible_values_when_made() -> None:
    with pytest.raises(InputError, match="optimization_level"):
        TensorRTOptions(optimization_level=9)
