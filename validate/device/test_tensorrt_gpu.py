"""TensorRT proper, which times its kernels on a GPU: the engines must build and hold what their precision promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crt_export.environment import target_status
from crt_export.pipeline import BuildOptions, build
from crt_export.profile import load_profile


@pytest.mark.parametrize("target", ["trt-sm80-fp16", "trt-sm80-int8"])
def test_engines_build_and_are_listed(target: str, demo_checkpoint: Path, heldout_text: Path, tmp_path: Path) -> None:
    status = target_status(load_profile(target))
    if status.status == "needs":
        pytest.skip(f"{target} needs {', '.join(status.needs)}")
    options = BuildOptions(checkpoint=demo_checkpoint, output=tmp_path / "demo", targets=(target,), text=heldout_text)
    result = build(options)
    assert set(result.targets[0].engines) == {"step", "prefill"}
    kind = "int8 -> float32" if target.endswith("int8") else "float16 -> float16"
    for engine in result.targets[0].engines.values():
        layers = json.loads((tmp_path / "demo" / engine).with_suffix(".json").read_text(encoding="utf-8"))["layers"]
        assert {name for name in layers if name.startswith("gemm")} == {f"gemm {kind}"}
