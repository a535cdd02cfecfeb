"""The genuine CUDA device: every call it makes fits the installed cuda-bindings, and errors say what CUDA said."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from recording_device import RecordingDevice

from crt_export.engine.tensorrt import device
from crt_export.engine.tensorrt.device import CudaDevice
from crt_export.errors import ContractError, MissingDependencyError
from crt_export.machine import list_gpus

GPU = bool(list_gpus())


def calls() -> Iterator[tuple[str, int]]:
    """Every ``self._call(self._cuda.NAME, ...)`` of the source: the name and the number of arguments."""
    for node in ast.walk(ast.parse(inspect.getsource(device))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._call":
            yield ast.unparse(node.args[0]).removeprefix("self._cuda."), len(node.args) - 1


def names() -> set[str]:
    """Every dotted name that the source takes from the module."""
    found = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(inspect.getsource(device)))
        if isinstance(node, ast.Attribute) and re.match(r"(self\._)?cuda\.cuda", ast.unparse(node))
    }
    return {re.sub(r"^(self\._)?cuda\.", "", name) for name in found}


def parameters(function: Any) -> list[str]:
    """What cuda-bindings documents in the first line of a function."""
    found = re.match(rf"{function.__name__}\((.*)\)$", function.__doc__.splitlines()[0])
    assert found, f"{function.__name__} documents no signature"
    return [part for part in found.group(1).split(",") if part.strip()]


def test_every_cuda_call_exists_with_these_parameters_in_the_genuine_package() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed (Linux only)")
    made = list(calls())
    assert len(made) >= 18, "the source makes more calls: the walk has missed them"
    assert [(name, count) for name, count in made if len(parameters(getattr(cuda, name))) != count] == []
    for name in names():
        found: Any = cuda
        for part in name.split("."):
            found = getattr(found, part)


def test_a_wrong_number_of_arguments_would_be_noticed() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed (Linux only)")
    assert len(parameters(cuda.cudaMemset2DAsync)) == 6
    assert len(parameters(cuda.cudaGetDeviceCount)) == 0


def test_the_device_of_the_tests_has_every_method_with_the_same_parameters() -> None:
    for name, method in inspect.getmembers(CudaDevice, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(vars(RecordingDevice)[name]) == inspect.signature(method), name


@pytest.mark.skipif(GPU, reason="this machine has a GPU")
def test_a_machine_without_a_driver_is_a_missing_dependency_with_the_name_of_the_error() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed (Linux only)")
    with pytest.raises(MissingDependencyError, match=r"cudaGetDeviceCount failed with cudaError\w+ \(.+\)"):
        CudaDevice()


# Handles and addresses are plain numbers. The genuine functions must take them as such: no TypeError.
WITH_NUMBERS: dict[str, Callable[[CudaDevice], object]] = {
    "cudaMalloc": lambda device: device.allocate(256),
    "cudaHostAlloc": lambda device: device.allocate_host(256),
    "cudaStreamCreateWithFlags": lambda device: device.create_stream(),
    "cudaFree": lambda device: device.free(256),
    "cudaFreeHost": lambda device: device.free_host(256),
    "cudaMemcpyAsync": lambda device: device.copy(256, 512, 8, 3),
    "cudaMemset2DAsync": lambda device: device.fill_zero(256, pitch=8, width=4, height=2, stream=3),
    "cudaStreamBeginCapture": lambda device: device.begin_capture(3),
    "cudaStreamEndCapture": lambda device: device.end_capture(3),
    "cudaGraphLaunch": lambda device: device.launch_graph(3, 4),
    "cudaGraphExecDestroy": lambda device: device.free_graph(3),
    "cudaStreamSynchronize": lambda device: device.synchronize(3),
    "cudaStreamDestroy": lambda device: device.free_stream(3),
}


@pytest.mark.skipif(GPU, reason="made-up handles are for machines without a GPU")
@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_the_genuine_functions_take_plain_numbers(name: str) -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed (Linux only)")
    device = object.__new__(CudaDevice)
    device._cuda = cuda
    with pytest.raises(ContractError, match=f"{name}.* failed with cudaError"):
        WITH_NUMBERS[name](device)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(device.importlib, "import_module", refuse)
    with pytest.raises(MissingDependencyError, match=r"needs the package cuda-bindings.*crt-export\[rtx\]"):
        CudaDevice()


class Code(int):
    """Stands in for cudaError_t."""

    cudaSuccess = 0


class FakeCuda:
    """A module whose calls answer what a test says; the real one answers nothing without a GPU."""

    cudaError_t = Code
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)

    def __init__(self, **answers: tuple[Any, ...]) -> None:
        self.answers = {"cudaGetDeviceCount": (0, 1), **answers}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            del arguments
            return self.answers.get(name, (0,))

        call.__name__ = name
        return call


def fake_device(monkeypatch: pytest.MonkeyPatch, **answers: tuple[Any, ...]) -> CudaDevice:
    cuda = FakeCuda(cudaGetErrorName=(0, b"cudaErrorName"), cudaGetErrorString=(0, b"what it means"), **answers)
    monkeypatch.setattr(device.importlib, "import_module", lambda name: cuda)
    return CudaDevice()


def test_a_failed_call_says_which_and_how_cuda_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_device(monkeypatch, cudaMalloc=(2, None), cudaStreamSynchronize=(700,))
    with pytest.raises(ContractError, match=r"cudaMalloc of 4,096 bytes failed with cudaErrorName \(what it means\)"):
        device.allocate(4096)
    with pytest.raises(ContractError, match=r"cudaStreamSynchronize failed with cudaErrorName"):
        device.synchronize(3)


def test_no_device_is_a_missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDependencyError, match="the driver offers none"):
        fake_device(monkeypatch, cudaGetDeviceCount=(0, 0))


def test_a_capture_that_cannot_be_abandoned_does_not_hide_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_device(monkeypatch, cudaStreamEndCapture=(901, None))
    device.abandon_capture(3)
    with pytest.raises(ContractError, match="cudaStreamEndCapture failed"):
        device.end_capture(3)


def test_only_contiguous_host_memory_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_device(monkeypatch)
    with pytest.raises(ContractError, match="only contiguous host memory"):
        device.copy_to_device(0, np.zeros((4, 4))[:, 1], 3)
