"""What tests of several folders share: tokenizers of every kind, and the recording TensorRT."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crt_export.bundle import BundleFiles, open_bundle
from crt_export.engine.base import Engine
from crt_export.engine.tensorrt.engine import Machine
from crt_export.machine import Gpu
from crt_export.models.declaration import ModelInfo
from crt_export.runtime import Bundle
from crt_export.runtime.opening import Target, compiled_engine, engine_from_target

UNIT_TESTS = Path(__file__).parent
ENGINE_TESTS = UNIT_TESTS / "engine"
A100 = Gpu(name="A100", compute_capability=80)
# The tests are no package, so the folders of the modules that they share go on the path.
for folder in (ENGINE_TESTS, UNIT_TESTS, UNIT_TESTS / "bundle", UNIT_TESTS.parent / "parity"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@pytest.fixture(scope="session")
def tokenizer_kinds() -> ModuleType:
    """The module tokenizer_kinds.py beside this file."""
    return importlib.import_module("tokenizer_kinds")


@dataclass(frozen=True)
class Recording:
    """A machine without a GPU on which TensorRT targets run.

    Attributes:
        device: The RecordingDevice.
        api: The RecordingTensorRT.
    """

    device: Any
    api: Any


@pytest.fixture(scope="session")
def new_recording() -> Callable[[], Recording]:
    """``new_recording()``: another such machine, with nothing on it."""

    def make() -> Recording:
        device = importlib.import_module("recording_device").RecordingDevice()
        api = importlib.import_module("recording_tensorrt").RecordingTensorRT(device)
        return Recording(device=device, api=api)

    return make


@pytest.fixture(scope="session")
def open_recorded(new_recording: Callable[[], Recording]) -> Callable[..., Bundle]:
    """``open_recorded(path, recording=None, gpu=A100)``: open a bundle whose TensorRT engines run on such a machine."""

    def open_it(path: Path, recording: Recording | None = None, gpu: Gpu = A100) -> Bundle:
        place = recording or new_recording()
        machine = Machine(api=place.api, device=place.device, gpu=gpu)

        def open_engine(files: BundleFiles, target: Target, model: ModelInfo, threads: int) -> Engine:
            if target.profile.compiled:
                return compiled_engine(files, target, model, machine)
            return engine_from_target(files, target, model, threads)

        return Bundle(open_bundle(path, allow_unvalidated=True), open_engine)

    return open_it


@pytest.fixture
def recording(new_recording: Callable[[], Recording]) -> Iterator[Recording]:
    """A recording machine; the test fails if anything on it was misused, even where nobody saw the error."""
    machine = new_recording()
    yield machine
    assert machine.device.misuses == []
