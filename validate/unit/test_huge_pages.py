"""Memory that appears while a graph is loaded is moved into huge pages, and nothing else is touched."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import onnx
import pytest

from crt_export.engine import memory_map
from crt_export.engine.memory_map import allocated_in_huge_pages, huge_page_size, private_memory, without
from crt_export.engine.onnxruntime import load_with_settings
from crt_export.engine.ort import OrtSettings, import_onnxruntime
from crt_export.profile_options import OrtOptions

_MAPS = """\
555500000000-555500021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
7f0000400000-7f0000800000 r--p 00000000 00:00 0
7f0000800000-7f0000c00000 rw-s 00000000 00:01 7                          /memfd:shared (deleted)
7f0000c00000-7f0001000000 rw-p 00001000 fe:00 1234                       /opt/a folder/weights.data
7f0001000000-7f0001400000 rw-p 00000000 00:00 0                          [anon:arena]
"""

needs_huge_pages = pytest.mark.skipif(
    not huge_page_size() or "[madvise]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="this system has no huge pages, or gives them unasked",
)


def test_only_private_writable_memory_without_a_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "maps").write_text(_MAPS, encoding="utf-8")
    monkeypatch.setattr(memory_map, "_MAPS", tmp_path / "maps")
    assert private_memory() == [
        (0x555500000000, 0x555500021000),
        (0x7F0000000000, 0x7F0000400000),
        (0x7F0001000000, 0x7F0001400000),
    ]


@pytest.mark.parametrize(
    ("ranges", "taken", "left"),
    [
        ([(10, 20), (30, 40)], [], [(10, 20), (30, 40)]),
        ([(10, 20)], [(10, 20)], []),
        ([(10, 50)], [(0, 12), (20, 30), (48, 60)], [(12, 20), (30, 48)]),
        ([(10, 20), (30, 40)], [(15, 35)], [(10, 15), (35, 40)]),
    ],
)
def test_what_was_there_before_is_left_out(ranges: list, taken: list, left: list) -> None:
    assert without(ranges, taken) == left


@needs_huge_pages
def test_memory_filled_inside_is_moved_and_keeps_its_content() -> None:
    before = _huge_bytes()
    with allocated_in_huge_pages():
        # From the system: numpy may take memory that was there before, or ask for huge pages itself.
        memory = mmap.mmap(-1, 48 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        values = np.frombuffer(memory, np.uint32)
        values[:] = np.arange(values.size)
    assert np.array_equal(values, np.arange(values.size))
    assert _huge_bytes() - before >= 32 << 20


@needs_huge_pages
def test_a_graph_lies_in_huge_pages_only_where_its_settings_say_so(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((2048, 8192)).astype(np.float32)
    product = onnx.helper.make_node("MatMul", ["input", "weights"], ["output"])
    graph = onnx.helper.make_graph(
        [product],
        "product",
        [onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 2048])],
        [onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [1, 8192])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    path = tmp_path / "product.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10), path)
    gains = []
    for wanted in (False, True):
        before = _huge_bytes()
        settings = OrtSettings(threads=1, options=OrtOptions(huge_pages=wanted))
        loaded = load_with_settings(import_onnxruntime(), path, settings, stop_spinning=True)
        gains.append(_huge_bytes() - before)
        value = np.ones((1, 2048), np.float32)
        assert np.allclose(loaded.run({"input": value})["output"], value @ weights, atol=1e-3)
    assert gains[1] - gains[0] >= weights.nbytes // 2


def test_unwanted_it_does_not_even_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_map, "private_memory", None)  # calling it would fail
    with allocated_in_huge_pages(False):
        pass


@pytest.mark.parametrize(
    ("setting", "size"),
    [("always madvise [never]", 2 << 20), (None, 2 << 20), ("[madvise]", None), ("[madvise]", 512 << 20)],
)
def test_a_system_without_huge_pages_is_left_alone(
    setting: str | None, size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (("enabled", setting), ("hpage_pmd_size", size)):
        if content is not None:
            (tmp_path / name).write_text(str(content), encoding="ascii")
    monkeypatch.setattr(memory_map, "_SETTINGS", tmp_path)
    assert huge_page_size() == 0


def test_what_cannot_be_looked_at_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_map, "_MAPS", tmp_path / "nowhere")
    assert private_memory() == []
    with allocated_in_huge_pages():
        pass


def test_an_error_inside_is_passed_on() -> None:
    with pytest.raises(ValueError, match="inside"), allocated_in_huge_pages():
        raise ValueError("inside")


def _huge_bytes() -> int:
    """Bytes of this process that lie in huge pages."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("AnonHugePages:"))
