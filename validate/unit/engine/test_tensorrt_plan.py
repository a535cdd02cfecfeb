"""What a launch binds: refused before TensorRT sees it, and staged where rows are not aligned."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from crt_export.engine.base import BufferSlice
from crt_export.engine.tensorrt.api import EngineTensor
from crt_export.engine.tensorrt.launch import ALIGNMENT, LaunchPlan, plan_launch
from crt_export.engine.tensorrt.memory import DeviceMemory, DeviceResources, DeviceTensor
from crt_export.errors import ContractError
from crt_export.spec import TensorSpec

Bound = dict[str, BufferSlice]


def tensor(
    name: str, dims: tuple[int, ...], *, most: tuple[int, ...] = (), dtype: str = "float32", alias: str = ""
) -> EngineTensor:
    spec = TensorSpec(name=name, dtype=dtype, dims=dims)
    least = tuple(1 if dim == -1 else dim for dim in dims) if most else ()
    return EngineTensor(spec=spec, is_input=bool(most), least=least, most=most, alias=alias)


ENGINE = (
    tensor("ids", (-1, 1), most=(4, 1), dtype="int64"),
    tensor("state", (-1, 1, 8), most=(4, 1, 8)),
    tensor("past", (-1, 2, 3, 5), most=(4, 2, 3, 5)),
    tensor("logits", (-1, 64)),
    tensor("next_state", (-1, 1, 8)),
    tensor("present", (-1, 2, 3, 5), alias="past"),
)


@pytest.fixture
def memory(recording: Any) -> DeviceMemory:
    return DeviceMemory(recording.device, DeviceResources())


def bound(memory: DeviceMemory, start: int = 0, stop: int = 4) -> tuple[Bound, Bound]:
    def rows(shape: tuple[int, ...], dtype: str = "float32") -> BufferSlice:
        return BufferSlice(DeviceTensor(memory, shape, dtype), start, stop)

    inputs = {"ids": rows((4, 1), "int64"), "state": rows((4, 1, 8)), "past": rows((4, 2, 3, 5))}
    outputs = {"logits": rows((4, 64)), "next_state": rows((4, 1, 8)), "present": inputs["past"]}
    return inputs, outputs


def plan(memory: DeviceMemory, inputs: Bound, outputs: Bound) -> LaunchPlan:
    return plan_launch(ENGINE, inputs, outputs, memory, label="x step")


def test_whole_tensors_are_bound_where_they_are(memory: DeviceMemory, recording: Any) -> None:
    inputs, outputs = bound(memory)
    before = recording.device.counts["allocate"]
    found = plan(memory, inputs, outputs)
    assert found.addresses == {name: rows.address for name, rows in {**inputs, **outputs}.items()}
    assert found.shapes == {"ids": (4, 1), "state": (4, 1, 8), "past": (4, 2, 3, 5)}
    assert (found.copies_in, found.copies_out, found.staging) == ((), (), ())
    assert found.in_place == ((inputs["past"].address, 4 * 120),)
    assert recording.device.counts["allocate"] == before


def test_rows_that_are_not_aligned_go_through_staging_and_a_cache_through_one_for_both(memory: DeviceMemory) -> None:
    inputs, outputs = bound(memory, 1, 3)
    found = plan(memory, inputs, outputs)
    assert all(address % ALIGNMENT == 0 for address in found.addresses.values())
    assert found.addresses["logits"] == outputs["logits"].address, "64 logits are 256 bytes: aligned in every row"
    assert found.addresses["past"] == found.addresses["present"] != inputs["past"].address
    assert {copy.source for copy in found.copies_in} == {inputs[name].address for name in ("ids", "state", "past")}
    assert {copy.target for copy in found.copies_out} == {outputs[name].address for name in ("next_state", "present")}
    assert sorted(copy.size for copy in found.copies_in) == [16, 64, 240]
    assert found.in_place == ((inputs["past"].address, 240),)


def test_staging_goes_with_the_plan(memory: DeviceMemory, recording: Any) -> None:
    inputs, outputs = bound(memory, 1, 3)
    before = recording.device.live["memory"]
    found = plan(memory, inputs, outputs)
    assert recording.device.live["memory"] == before + 4
    del found
    assert recording.device.live["memory"] == before


def swap(inputs: Bound, outputs: Bound, memory: DeviceMemory) -> None:
    outputs["next_state"] = inputs["state"]


def copy_cache(inputs: Bound, outputs: Bound, memory: DeviceMemory) -> None:
    outputs["present"] = BufferSlice(DeviceTensor(memory, (4, 2, 3, 5), "float32"), 0, 4)


def two_outputs(inputs: Bound, outputs: Bound, memory: DeviceMemory) -> None:
    outputs["next_state"] = BufferSlice(outputs["logits"].buffer, 0, 4)


def partly(inputs: Bound, outputs: Bound, memory: DeviceMemory) -> None:
    both = DeviceTensor(memory, (6, 1, 8), "float32")
    inputs["state"], outputs["next_state"] = BufferSlice(both, 0, 4), BufferSlice(both, 2, 6)


def wrong_dtype(inputs: Bound, outputs: Bound, memory: DeviceMemory) -> None:
    inputs["ids"] = BufferSlice(DeviceTensor(memory, (4, 1), "float32"), 0, 4)


def too_many(inputs: Bound, outputs: Bound, memory: DeviceMemory) -> None:
    inputs["ids"] = BufferSlice(DeviceTensor(memory, (5, 1), "int64"), 0, 5)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (swap, "next_state shares memory with state"),
        (partly, "next_state shares memory with state"),
        (two_outputs, "next_state shares memory with logits"),
        (copy_cache, "present must be at the address of past, which it updates in place"),
        (wrong_dtype, "ids must be int64, found float32"),
        (too_many, r"ids must have shape \[1, 1\] to \[4, 1\], found \[5, 1\]"),
        (lambda i, o, m: i.pop("state"), "input state is missing"),
        (lambda i, o, m: o.pop("logits"), "output logits is missing"),
        (lambda i, o, m: i.update(position=i["ids"]), "position is no input of the engine"),
        (lambda i, o, m: o.update(logits=i["ids"]), r"logits must have shape \[-1, 64\], found \[4, 1\]"),
    ],
)
def test_what_tensorrt_would_get_wrong_in_silence_is_refused(
    memory: DeviceMemory, spoil: Callable[[Bound, Bound, DeviceMemory], object], complaint: str
) -> None:
    inputs, outputs = bound(memory)
    spoil(inputs, outputs, memory)
    with pytest.raises(ContractError, match=complaint) as caught:
        plan(memory, inputs, outputs)
    assert str(caught.value).startswith("x step: the bound tensors")


def test_all_problems_are_listed_at_once(memory: DeviceMemory) -> None:
    inputs, outputs = bound(memory)
    wrong_dtype(inputs, outputs, memory)
    swap(inputs, outputs, memory)
    copy_cache(inputs, outputs, memory)
    with pytest.raises(ContractError, match="3 problems"):
        plan(memory, inputs, outputs)


def recorded_context(recording: Any, places: dict[str, int]) -> Any:
    """A context of an engine with a state and a cache of 32 bytes each, its tensors at these places."""
    fake = importlib.import_module("recording_tensorrt")
    shape = {"dtype": "float32", "dims": [1, 8]}
    engine = object.__new__(fake.Engine)
    engine.api, engine.logger, engine.name = recording.api, fake.Logger(), "step"
    engine.inputs = {name: {**shape, "min": [1, 8], "max": [1, 8]} for name in ("state", "past")}
    engine.tensors = {**engine.inputs, "next_state": shape, "present": shape}
    engine.aliases = {"present": "past"}
    context = engine.create_execution_context()
    for name, place in places.items():
        context.set_tensor_address(name, place)
    for name in engine.inputs:
        context.set_input_shape(name, (1, 8))
    return context


PLACES = {"state": 256, "past": 512, "next_state": 1024, "present": 512}


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        ({"next_state": 256}, "next_state shares memory with state"),
        ({"next_state": 512}, "next_state shares memory with"),
        ({"present": 2048}, "present is not at the address of past"),
        ({"state": 264}, "no multiple of 256"),
    ],
)
def test_the_recording_machine_refuses_the_same(
    new_recording: Callable[[], Any], places: dict[str, int], complaint: str
) -> None:
    """The tests of the session rely on it, and on a misuse being kept."""
    recording = new_recording()
    stream = recording.device.create_stream()
    with pytest.raises(AssertionError, match=complaint):
        recorded_context(recording, {**PLACES, **places}).execute_async_v3(stream)
    assert len(recording.device.misuses) == 1


def test_the_recording_machine_refuses_the_default_stream_and_a_capture_without_a_run(
    new_recording: Callable[[], Any],
) -> None:
    recording = new_recording()
    context, stream = recorded_context(recording, PLACES), recording.device.create_stream()
    with pytest.raises(AssertionError, match="stream 0, which does not exist"):
        context.execute_async_v3(0)
    context = recorded_context(recording, PLACES)
    recording.device.begin_capture(stream)
    with pytest.raises(AssertionError, match="captured without a run before it"):
        context.execute_async_v3(stream)


def test_the_recording_machine_refuses_a_graph_whose_memory_is_gone(new_recording: Callable[[], Any]) -> None:
    device = new_recording().device
    stream, source, target = device.create_stream(), device.allocate(8), device.allocate(8)
    device.begin_capture(stream)
    device.copy(target, source, 8, stream)
    graph = device.end_capture(stream)
    device.launch_graph(graph, stream)
    device.synchronize(stream)
    device.free(source)
    device.launch_graph(graph, stream)
    with pytest.raises(AssertionError, match="not allocated, or not any more"):
        device.synchronize(stream)
