"""The fault table in full: FP32 and INT8, the two-layer model and the trained demo, every level asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_ladder as ladder
import faults
import numpy as np
import pytest
from fault_bundle import SpoiledBundle

from crt_export.checkpoint import Checkpoint
from crt_export.pipeline import BuildOptions, build

pytestmark = [pytest.mark.evidence, pytest.mark.timeout(600)]

TARGETS = {"fp32": "ort-cpu-fp32", "w8": "ort-cpu-int8"}
TWO_LAYERS, DEMO = "two layers", "demo"
_FEW: dict[str, Any] = {"chain_windows": 2, "chain_steps": 24, "prompts": 4, "new_tokens": 8}
_SHORT = {"validation_tokens": 512, "window": 32, "short_reason": "fault injection"}
#: The demo's likelihoods are gated, which takes as many tokens as a build has.
OPTIONS = {TWO_LAYERS: {**_FEW, **_SHORT}, DEMO: _FEW}
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def bundles(
    parity_checkpoint: Checkpoint, demo_checkpoint: Path, heldout_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Both models for both targets; the demo's own report records how well it knows its text."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, checkpoint in ((TWO_LAYERS, parity_checkpoint.path), (DEMO, demo_checkpoint)):
        build(
            BuildOptions(
                checkpoint=checkpoint,
                output=folder / name,
                targets=tuple(TARGETS.values()),
                text=heldout_text,
                validated=name == DEMO,
                capacity=64 if name == TWO_LAYERS else None,
            )
        )
    return {name: folder / name for name in (TWO_LAYERS, DEMO)}


def _cases() -> list[Any]:
    return [
        pytest.param(name, precision, fault, id=f"{name}-{precision}-{fault.name}")
        for name, layers in ((TWO_LAYERS, 2), (DEMO, 1))
        for precision in TARGETS
        for fault in faults.FAULTS
        # The two-layer model answers for the graphs that no session opens.
        if precision in fault.caught and fault.layers <= layers and not (fault.interchange and name == DEMO)
    ]


@pytest.mark.parametrize(("name", "precision", "fault"), _cases())
def test_a_fault_is_caught_by_its_level(
    bundles: dict[str, Path],
    name: str,
    precision: str,
    fault: Any,
    tmp_path: Path,
    heldout_text: Path,
    record_property: Record,
) -> None:
    spoiled = SpoiledBundle(bundles[name], tmp_path / "bundle", TARGETS[precision])
    found = ladder.catch(fault, spoiled, OPTIONS[name], text=heldout_text, everything=name == TWO_LAYERS)
    record_property("fault", {"bundle": name, **found.to_dict()})
    assert found.level == fault.caught[precision], found
    assert found.named, found


def _untouched(_: Any) -> None:
    """Nothing is wrong with the bundle."""


@pytest.mark.parametrize("target", TARGETS.values())
@pytest.mark.parametrize("kind", ["bytes", "letters", "ids"])
def test_random_validation_text_is_caught(
    bundles: dict[str, Path], kind: str, target: str, tmp_path: Path, record_property: Record
) -> None:
    """Bytes are no UTF-8; random letters and ids are, so it takes a model that knows its text to tell."""
    generator = np.random.default_rng(0)
    size, path = 20_000, tmp_path / ("text.npy" if kind == "ids" else "text.txt")
    if kind == "ids":
        np.save(path, generator.integers(0, 256, size))
    else:
        low, high = (0, 256) if kind == "bytes" else (32, 127)
        path.write_bytes(generator.integers(low, high, size).astype(np.uint8).tobytes())
    level, says = ("opening", "expected UTF-8 text") if kind == "bytes" else ("corpus", "not text the model knows")
    fault = faults.Fault(name=f"validation text replaced by random {kind}", inject=_untouched, caught={}, says=(says,))
    spoiled = SpoiledBundle(bundles[DEMO], tmp_path / "bundle", target)
    text, tokens = (None, path) if kind == "ids" else (path, None)
    found = ladder.catch(fault, spoiled, OPTIONS[DEMO], text=text, tokens=tokens)
    record_property("fault", {"bundle": DEMO, **found.to_dict()})
    assert (found.level, found.named) == (level, True), found


@pytest.mark.parametrize(("name", "precision"), [(name, p) for name in (TWO_LAYERS, DEMO) for p in TARGETS])
def test_sound_bundles_pass(
    bundles: dict[str, Path], name: str, precision: str, tmp_path: Path, heldout_text: Path
) -> None:
    fault = faults.Fault(name="none", inject=_untouched, caught={})
    spoiled = SpoiledBundle(bundles[name], tmp_path / "bundle", TARGETS[precision])
    assert ladder.catch(fault, spoiled, OPTIONS[name], text=heldout_text).level is None


def test_the_rotation_that_is_injected_is_that_of_the_other_layout(
    bundles: dict[str, Path], parity_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The edited file computes what an export of the same weights with ``rope_layout = half`` does."""
    import dataclasses

    from crt_export.engine.onnxruntime import load_graph
    from crt_export.graph.export import export_graph
    from crt_export.graph.weights import write_graph, write_weights
    from crt_export.models.registry import model_from_checkpoint

    half = dataclasses.replace(
        parity_checkpoint, config=dataclasses.replace(parity_checkpoint.config, rope_layout="half")
    )
    graph = export_graph(model_from_checkpoint(half), "step")
    weights = write_weights({"step": graph}, tmp_path / "half.weights")
    write_graph(graph, tmp_path / "half.onnx", weights)
    spoiled = SpoiledBundle(bundles[TWO_LAYERS], tmp_path / "bundle", TARGETS["fp32"])
    next(fault for fault in faults.FAULTS if fault.name == "RoPE layout wrong in step").inject(spoiled)
    generator = np.random.default_rng(0)
    exported, edited = (load_graph(path, threads=1) for path in (tmp_path / "half.onnx", spoiled.graphs["step"]))
    inputs = {
        spec.name: np.full(_shape(spec.dims), 5)
        if spec.dtype == "int64"
        else generator.standard_normal(_shape(spec.dims)).astype(np.float32)
        for spec in exported.inputs
    }
    expected, found = exported.run(inputs), edited.run(inputs)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5, err_msg=name)


def _shape(dims: tuple[int | str, ...]) -> list[int]:
    return [{"batch": 2, "capacity": 16}[dim] if isinstance(dim, str) else dim for dim in dims]
