from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import tomllib
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from crt_export import environment
from crt_export.environment import target_status
from crt_export.machine import Gpu
from crt_export.profile import load_profile

Install = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """``machine(*gpus, package=version...)``: what the machine pretends to have."""

    folder = tmp_path / "site-packages"

    def pretend(*gpus: Gpu, **versions: str) -> None:
        def version(distribution: str) -> str:
            try:
                return versions[distribution.replace("-", "_")]
            except KeyError:
                raise importlib.metadata.PackageNotFoundError(distribution) from None

        def spec(module: str) -> ModuleSpec | None:
            known = {
                found.module for found in environment.DEPENDENCIES if found.distribution.replace("-", "_") in versions
            }
            return ModuleSpec(module, None, origin=str(folder / module)) if module in known | modules else None

        modules = {"onnxruntime"} if any(name.startswith(("onnxruntime", "ort_")) for name in versions) else set()
        claims = {
            "onnxruntime": [name.replace("_", "-") for name in versions if name.startswith(("onnxruntime", "ort_"))]
        }
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", spec)
        monkeypatch.setattr(environment, "_claims", lambda: claims)
        monkeypatch.setattr(environment, "gpus", lambda: gpus)

    return pretend


A100 = Gpu(name="A100", compute_capability=80)
H200 = Gpu(name="H200", compute_capability=90)
T4 = Gpu(name="T4", compute_capability=75)


def test_cpu_targets_run_with_either_wheel(machine: Install) -> None:
    profile = load_profile("ort-cpu-fp32")
    machine(onnxruntime="1.31.1")
    assert target_status(profile).status == "run"
    machine(onnxruntime_gpu="1.31.1")
    assert target_status(profile).status == "run"
    machine()
    assert target_status(profile).needs == ("onnxruntime: pip install 'crt-export[cpu]'",)


@pytest.mark.parametrize(
    "distribution", ["onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn", "ort-nightly", "somebodys-ort"]
)
def test_whatever_provides_the_module_is_the_runtime(machine: Install, distribution: str) -> None:
    name = "onnxruntime_of_somebody" if distribution == "somebodys-ort" else distribution.replace("-", "_")
    machine(A100, **{name: "1.24.1"})
    assert target_status(load_profile("ort-cpu-fp32")).status == "run"
    assert environment.onnxruntime_distributions() == (name.replace("_", "-"),)
    assert environment.environment_problems() == []
    onnxruntime, gpu = (environment.find_dependency(known) for known in ("onnxruntime", "onnxruntime-gpu"))
    assert (onnxruntime.version, onnxruntime.install) == ("unknown", "")
    assert gpu.install == f"only in place of {name.replace('_', '-')}"
    (need,) = target_status(load_profile("ort-cuda-fp16")).needs
    assert need.startswith(f"onnxruntime-gpu in place of {name.replace('_', '-')}")


def test_every_distribution_that_holds_the_module_is_named(machine: Install) -> None:
    machine(onnxruntime="1.31.1", onnxruntime_openvino="1.24.1")
    assert environment.onnxruntime_distributions() == ("onnxruntime", "onnxruntime-openvino")
    assert target_status(load_profile("ort-cpu-fp32")).status == "run"


def test_another_distribution_with_nvidias_provider_runs_cuda_targets(machine: Install, tmp_path: Path) -> None:
    machine(A100, ort_nightly_gpu="1.32")
    library = tmp_path / "site-packages" / "capi" / "libonnxruntime_providers_cuda.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert target_status(load_profile("ort-cuda-fp16")).status == "run"


def test_a_module_without_metadata_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a frozen application."""
    (tmp_path / "frozen_thing").mkdir()
    (tmp_path / "frozen_thing" / "__init__.py").write_text("__version__ = '3.2.1'\n", encoding="utf-8")
    (tmp_path / "mute_thing.py").touch()
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    names = ("frozen_thing", "mute_thing", "only_a_folder", "absent_thing", "absent_thing.part")
    assert [environment.module_version(name) for name in names] == ["3.2.1", "unknown", None, None, None]
    assert environment.distribution_version("frozen_thing") is None


def test_advice_never_puts_one_wheel_over_another(machine: Install) -> None:
    machine(onnxruntime_gpu="1.31.1")
    assert environment.find_dependency("onnxruntime").install == "only in place of onnxruntime-gpu"
    machine()
    assert environment.find_dependency("onnxruntime").install == "pip install 'crt-export[cpu]'"


def test_both_onnxruntime_wheels_are_a_problem(machine: Install) -> None:
    machine(A100, onnxruntime="1.31.1", onnxruntime_gpu="1.31.1")
    assert environment.environment_problems() == [environment.ORT_CONFLICT]
    assert target_status(load_profile("ort-cpu-fp32")).needs == (environment.ORT_CONFLICT,)


def test_cuda_target_names_wheel_and_gpu(machine: Install) -> None:
    profile = load_profile("ort-cuda-fp16")
    machine(onnxruntime="1.31.1")
    wheel, gpu = target_status(profile).needs
    assert "in place of onnxruntime" in wheel
    assert "crt-export[cuda]" in wheel
    assert gpu == "an NVIDIA GPU"
    machine(A100, onnxruntime_gpu="1.31.1")
    assert target_status(profile).status == "run"


def test_tensorrt_needs_the_gpu_it_builds_for(machine: Install) -> None:
    profile = load_profile("trt-sm80-fp16")
    machine(tensorrt="11.4.0.12")
    (need,) = target_status(profile).needs
    for part in (
        "tensorrt 10.16 or newer",
        "crt-export[tensorrt]",
        "compute capability 8.0 or newer,",
        "rtx-* targets compile without a GPU",
        "; this machine has no usable NVIDIA GPU",
    ):
        assert part in need
    machine(T4, H200, tensorrt="11.4.0.12")  # TensorRT builds on the first one
    assert target_status(profile).needs[0].endswith("; this machine's first GPU is T4, 7.5")
    machine(H200, T4, tensorrt="11.4.0.12")
    assert target_status(profile).status == "compile"
    exact = dataclasses.replace(profile, options=dataclasses.replace(profile.options, ampere_plus=False))
    assert "compute capability 8.0, because" in target_status(exact).needs[0]


def test_everything_that_tensorrt_lacks_is_named_at_once(machine: Install) -> None:
    machine()
    (need,) = target_status(load_profile("trt-sm80-int8")).needs
    assert need.endswith("; tensorrt is not installed and this machine has no usable NVIDIA GPU")


def test_too_old_packages_do_not_count(machine: Install) -> None:
    machine(A100, tensorrt="10.9.0", onnxruntime="1.31.1")
    (need,) = target_status(load_profile("trt-sm80-fp16")).needs
    assert need.startswith("tensorrt 10.16 or newer")
    assert need.endswith("; found tensorrt 10.9.0")
    assert environment.environment_problems() == [
        "tensorrt 10.9.0 is too old, 10.16 is needed: pip install --upgrade 'crt-export[tensorrt]'"
    ]


def test_rtx_compiles_without_a_gpu(machine: Install) -> None:
    machine(tensorrt_rtx="1.7.1.116")
    assert target_status(load_profile("rtx-sm80-int8")).status == "compile"
    machine()
    assert "crt-export[rtx]" in target_status(load_profile("rtx-sm80-int8")).needs[0]


@pytest.mark.parametrize(
    ("module", "extra"),
    [("torch.export", "export"), ("onnxruntime", "cpu"), ("tensorrt_rtx", "rtx"), ("tokenizers", "text")],
)
def test_missing_module_names_the_extra(module: str, extra: str) -> None:
    error = environment.missing_module_error(module, "this")
    assert error is not None
    assert f"crt-export[{extra}]" in str(error)


@pytest.mark.parametrize("module", ["crt_export.absent", "", None])
def test_other_missing_modules_are_not_explained_away(module: str | None) -> None:
    assert environment.missing_module_error(module, "this") is None


def test_every_extra_installs_what_doctor_says_it_does() -> None:
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for dependency in environment.DEPENDENCIES:
        least = ".".join(map(str, dependency.minimum))
        wanted = f"{dependency.distribution}>={least}"
        assert any(requirement.startswith(wanted) for requirement in extras[dependency.extra]), wanted
