"""Tensors in device memory, and when it is given back."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from crt_export.engine.tensorrt import memory as device_memory
from crt_export.engine.tensorrt.memory import DeviceMemory, DeviceResources, DeviceTensor
from crt_export.errors import ContractError


@pytest.fixture
def memory(recording: Any) -> DeviceMemory:
    return DeviceMemory(recording.device, DeviceResources())


def test_a_new_tensor_is_zero_and_keeps_what_is_written(memory: DeviceMemory) -> None:
    tensor = DeviceTensor(memory, (2, 3), "float32")
    assert tensor.address % 256 == 0
    np.testing.assert_array_equal(tensor.read(), np.zeros((2, 3)))
    tensor.write(np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(tensor.read(), [[0, 1, 2], [3, 4, 5]])


def test_clear_zeroes_some_tokens_of_every_head_of_one_row(memory: DeviceMemory) -> None:
    tensor = DeviceTensor(memory, (3, 2, 5, 4), "float16")
    expected = np.random.default_rng(0).standard_normal(tensor.shape).astype(np.float16)
    tensor.write(expected)
    tensor.clear(1, 2, 4)
    expected[1, :, 2:4] = 0
    np.testing.assert_array_equal(tensor.read(), expected)


def test_rows_are_copied_without_the_host(memory: DeviceMemory, recording: Any) -> None:
    source, target = (DeviceTensor(memory, (4, 3), "int64") for _ in range(2))
    source.write(np.arange(12).reshape(4, 3))
    before = recording.device.counts["copy_to_host"]
    target.copy_rows(source, slice(1, 3))
    assert recording.device.counts["copy_to_host"] == before
    np.testing.assert_array_equal(target.read(), [[0, 0, 0], [3, 4, 5], [6, 7, 8], [0, 0, 0]])


def test_small_tensors_cross_over_through_pinned_memory_made_once(
    memory: DeviceMemory, recording: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "MOST_PINNED", 64)
    small, large = DeviceTensor(memory, (8,), "int64"), DeviceTensor(memory, (9,), "int64")
    for tensor in (small, large):
        for value in range(3):
            tensor.write(np.full(tensor.shape, value))
            np.testing.assert_array_equal(tensor.read(), np.full(tensor.shape, value))
    assert recording.device.counts["allocate_host"] == 1


def test_memory_goes_with_its_tensor_but_not_while_what_was_read_is_in_use(
    memory: DeviceMemory, recording: Any
) -> None:
    tensor = DeviceTensor(memory, (8,), "int64")
    tensor.write(np.arange(8))
    half = tensor.read()[4:]
    del tensor
    gc.collect()
    assert recording.device.live["memory"] == 0
    assert recording.device.live["pinned"] == 1
    np.testing.assert_array_equal(half, [4, 5, 6, 7])
    del half
    gc.collect()
    assert recording.device.live["pinned"] == 0


def test_a_closed_engine_has_no_memory(recording: Any) -> None:
    resources = DeviceResources()
    memory = DeviceMemory(recording.device, resources)
    tensor = DeviceTensor(memory, (8,), "int64")
    resources.close()
    resources.close()
    assert recording.device.live == {"memory": 0, "pinned": 0, "streams": 0, "graphs": 0}
    for call in (tensor.read, lambda: tensor.write(np.zeros(8)), lambda: DeviceTensor(memory, (1,), "int64")):
        with pytest.raises(ContractError, match="this engine is closed"):
            call()


def test_nothing_is_released_while_a_stream_is_captured(recording: Any) -> None:
    """Python may collect garbage in the middle of a capture, in the very thread that captures."""
    resources = DeviceResources()
    memory = DeviceMemory(recording.device, resources)
    tensor = DeviceTensor(memory, (8,), "int64")
    with resources.deferred():
        recording.device.begin_capture(memory.stream)
        del tensor
        gc.collect()
        recording.device.abandon_capture(memory.stream)
        assert recording.device.live["memory"] == 1
    assert recording.device.live["memory"] == 0


def test_a_device_that_cannot_free_is_no_error_of_its_own(recording: Any) -> None:
    resources = DeviceResources()
    memory = DeviceMemory(recording.device, resources)
    tensor = DeviceTensor(memory, (8,), "int64")
    recording.device.fail["free"] = 0
    del tensor
    resources.close()
    assert resources.closed
