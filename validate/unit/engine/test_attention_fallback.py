"""``attention = "auto"``: without a fused kernel attention is decomposed; any other failure of a build is final."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.engine.tensorrt import build
from crt_export.errors import BuildError, NoEngineError
from crt_export.profile import DimRange, EngineProfile, load_profile
from crt_export.progress import no_progress
from crt_export.stages import graphs, targets
from crt_export.stages.graphs import GraphFile, GraphVariant, write_graphs

Prepared = tuple[Checkpoint, EngineProfile, dict[GraphVariant, GraphFile], Path]


@pytest.fixture(autouse=True)
def fused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler find out that it has no kernel, as for a shape whose kernels are not known beforehand."""
    monkeypatch.setattr(graphs, "attention_of_profile", lambda profile, carried: "fused")


@pytest.fixture
def prepared(fused_first: None, make_checkpoint: Callable[..., Path], tmp_path: Path, shared_traces: None) -> Prepared:
    """A model with head_dim 8, for which there is a fused kernel in a step and none in a prefill."""
    checkpoint = load_checkpoint(make_checkpoint(num_hidden_layers=1, unroll_steps=2))
    profile = load_profile("rtx-sm80-fp16").with_capacity(64).with_unroll(2)
    profile = dataclasses.replace(profile, seq=DimRange(1, 8, 16))
    return checkpoint, profile, write_graphs(checkpoint, [profile], None, tmp_path, no_progress), tmp_path


def test_auto_decomposes_what_has_no_fused_kernel_and_says_why(prepared: Prepared) -> None:
    checkpoint, profile, written, folder = prepared
    (built,) = targets.build_targets([profile], written, checkpoint.config, folder, no_progress)
    assert built.attention == "decomposed"
    assert "Attention" in built.refused
    assert set(built.engines) == {"step", "prefill"}
    entry = built.to_dict()
    assert (entry["attention"], entry["attention_refused"]) == ("decomposed", built.refused)
    for name, file in built.graphs.items():
        operators = {node.op_type for node in ir.load(folder / file.file).graph}
        assert "Attention" not in operators, f"{name} is validated as it is compiled"


def test_an_explicit_fused_is_not_replaced(prepared: Prepared) -> None:
    checkpoint, profile, written, folder = prepared
    fused = dataclasses.replace(profile, attention="fused")
    with pytest.raises(NoEngineError, match="prefill"):
        targets.build_targets([fused], written, checkpoint.config, folder, no_progress)


def test_an_engine_that_fails_its_check_is_final(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is really built; the first finding about its layers must end the build, not start another."""
    checkpoint, profile, written, folder = prepared
    checked: list[str] = []

    def refuse(*_: object, engine: str, **__: object) -> None:
        checked.append(engine)
        raise BuildError(f"{engine}: layers of the wrong precision")

    monkeypatch.setattr(build, "check_layers", refuse)
    with pytest.raises(BuildError, match="wrong precision"):
        targets.build_targets([profile], written, checkpoint.config, folder, no_progress)
    assert checked == ["rtx-sm80-fp16 step"]
