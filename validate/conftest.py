"""Checkpoints, tiny bundles and text that every test may use.

Fixtures that deliver functions are session-scoped, so that hypothesis tests can take them too. Importing a
module of the tests would tie them to a path; a fixture works against the installed package from any folder.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import site
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from crt_export.bundle import MANIFEST_NAME
from crt_export.bundle.manifest import sealed
from crt_export.checkpoint import load_checkpoint, tensor_shapes, write_checkpoint
from crt_export.config import ModelConfig
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"

if str(ROOT / "validate") not in sys.path:  # for modules here; pytest's import mode leaves the path alone
    sys.path.append(str(ROOT / "validate"))

Tensors = dict[str, torch.Tensor]
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
TINY: dict[str, Any] = {
    "model_type": "context_ready_transformer",
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "correction_intermediate_size": 48,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_layout": "interleaved",
    "unroll_steps": 4,
    "tie_word_embeddings": False,
    "tokenizer": "byte",
    "training_sequence_length": 32,
}


def _tiny_config(**changes: Any) -> ModelConfig:
    """A small CRT; ``model_type="transformer"`` also drops the correction."""
    values = {**TINY, **changes}
    if values["model_type"] == "transformer":
        values = {"unroll_steps": 1, **values, "correction_intermediate_size": None}
    if values["max_position_embeddings"] < (values["training_sequence_length"] or 0):
        values["training_sequence_length"] = values["max_position_embeddings"]
    return ModelConfig.from_dict(values)


def _random_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    """Every weight of a checkpoint, float32, linears as [out, in]; no bias is zero and no gain is one.

    The scales keep activations near one, so that the map from one pass to the next contracts as if trained.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * deviation

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == "embed.weight":
            return normal(shape, 0.5)
        if name.endswith("norm.weight"):
            return 1 + normal(shape, 0.1)
        return normal(shape, 0.1 if name.endswith("bias") else 0.5 / shape[1] ** 0.5)

    return {name: weight(name, shape) for name, shape in tensor_shapes(config).items()}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="append",
        default=[],
        metavar="NAME",
        help="Write the golden files of this name anew; 'formats' is all but bundle-v1 (validate/golden/README.md).",
    )
    parser.addoption("--fault-table", type=Path, metavar="FILE.md", help="Write what the gate said about every fault.")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which level caught which injected fault; the tests hand it over as a property, also from other processes."""
    ran = [report for name in ("passed", "failed") for report in terminalreporter.stats.get(name, [])]
    rows = [value for report in ran for name, value in report.user_properties if name == "fault"]
    if not rows:
        return
    sys.path.append(str(ROOT / "validate" / "parity"))
    table = importlib.import_module("fault_ladder")
    terminalreporter.section("faults: bundle, target, the level that caught it")
    for line in table.summary_lines(rows):
        terminalreporter.line(line)
    if path := terminalreporter.config.getoption("--fault-table"):
        table.write_table(path, rows)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test first, so that no worker is left with one at the end; needs --no-loadscope-reorder."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def own_surroundings(shared_folder: Path) -> Iterator[Path]:
    """Home, caches, temporary files and signals of the tests and of every process that they start.

    The caches are shared by the workers of a run and by nobody else: a test that counts on a stage being run needs a
    cache of its own. The folder has a short name, for the sockets that a browser makes in it.
    """
    own = Path(tempfile.mkdtemp(prefix="crt-tests-"))
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    surroundings = {"HOME": own / "home", "XDG_CACHE_HOME": shared_folder / "cache", "TMPDIR": own / "tmp"}
    # What is installed there, or makes compiling quicker, is no state of this package.
    tools = {"PYTHONUSERBASE": site.getuserbase(), "CCACHE_DIR": caches / "ccache"}
    tools["PLAYWRIGHT_BROWSERS_PATH"] = caches / "ms-playwright"
    with pytest.MonkeyPatch.context() as patch:
        for name, path in surroundings.items():
            path.mkdir(exist_ok=True)
            patch.setenv(name, str(path))
        for name, path in tools.items():
            if name not in os.environ and Path(path).is_dir():
                patch.setenv(name, str(path))
        patch.setattr(tempfile, "tempdir", None)
        # A background job and nohup ignore them, and so would every process that a test interrupts. What has a handler
        # here is at its default there.
        ignored = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
        for number in ignored:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else lambda *_: None)
        yield own
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
    shutil.rmtree(own, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """``tiny_config(**changes) -> ModelConfig``: see ``TINY`` for the defaults."""
    return _tiny_config


@pytest.fixture(scope="session")
def random_tensors() -> Callable[..., Tensors]:
    """``random_tensors(config, seed=0)``: float32 tensors by checkpoint name, the same for the same seed."""
    return _random_tensors


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_checkpoint(seed=0, dtype=torch.float32, edit=None, **changes) -> Path``, always a new folder.

    ``edit`` is called with the dict of tensors before it is written and changes it in place.
    """

    def make(
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        edit: Callable[[Tensors], object] | None = None,
        **changes: Any,
    ) -> Path:
        config = _tiny_config(**changes)
        tensors = {name: tensor.to(dtype) for name, tensor in _random_tensors(config, seed).items()}
        if edit is not None:
            edit(tensors)
        return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", config, tensors)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """A tiny two-layer CRT. Read it, never write into it: all tests of a process share the folder."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def tiny_transformer_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """The plain transformer of the same size. Read-only, like ``tiny_checkpoint``."""
    return make_checkpoint(model_type="transformer")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The trained checkpoint of the demo."""
    return DEMO / "checkpoint"


@pytest.fixture(scope="session")
def train_text() -> Path:
    """The text the demo was trained on."""
    return DEMO / "train.txt"


@pytest.fixture(scope="session")
def heldout_text() -> Path:
    """Real text the demo was not trained on."""
    return DEMO / "heldout.txt"


# --- what make cpp builds
@pytest.fixture(scope="session")
def cpp_build() -> Path:
    """Folder of the C++ library, its tests and its examples; CRT_RUNTIME_LIBRARY names another library than make's."""
    library = Path(os.environ.get("CRT_RUNTIME_LIBRARY", ROOT / "build" / "cpp" / "libcrt_runtime.so"))
    if not library.is_file():
        missing = ROOT / "build" / "onnxruntime" / "missing.txt"
        reason = f"there is no {library}: make cpp builds it"
        if missing.is_file():
            reason = missing.read_text(encoding="utf-8").strip()
        if os.environ.get("CRT_EXPORT_REQUIRE_CPP") == "1":
            pytest.fail(f"CRT_EXPORT_REQUIRE_CPP=1, but {reason}")
        pytest.skip(reason)
    return library.parent


# --- tiny bundles with really exported graphs


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def shared_traces(shared_folder: Path) -> Iterator[None]:
    """Every graph of an architecture is traced once in a test run, see shared_traces.py beside this file."""
    module = importlib.import_module("shared_traces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crt_export.graph.export.GraphExporter.part", module.shared_part(shared_folder / "traces"))
        patch.setattr("crt_export.stages.graphs.start_traces", module.no_traces_ahead)
        yield


@pytest.fixture(scope="session")
def tiny_bundle(
    make_checkpoint: Callable[..., Path], shared_folder: Path, shared_traces: None
) -> Callable[..., tuple[Path, LanguageModel]]:
    """``tiny_bundle(name, **changes) -> (folder, model)``: written once and shared by every worker of a test run.

    Its targets: see tiny_bundles.py beside this file.
    """

    def write(name: str, **changes: Any) -> tuple[Path, LanguageModel]:
        bundles = importlib.import_module("tiny_bundles")
        checkpoint = load_checkpoint(make_checkpoint(edit=bundles.overflow, **changes))
        model = model_from_checkpoint(checkpoint)
        kind = hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:8]
        output = shared_folder / f"runtime-{name}-{kind}"
        with FileLock(output.with_suffix(".lock")):
            if not (output / MANIFEST_NAME).is_file():
                bundles.write_tiny_bundle(output, model, checkpoint)
        return output, model

    return write


@pytest.fixture(scope="session")
def sign_again() -> Callable[[Path], None]:
    """``sign_again(bundle)``: make the manifest list the bundle's files as they are now."""

    def sign(bundle: Path) -> None:
        path = bundle / MANIFEST_NAME
        manifest = json.loads(path.read_text(encoding="utf-8"))
        contents = {file.relative_to(bundle).as_posix(): file.read_bytes() for file in bundle.rglob("*.*")}
        manifest["files"] = {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in sorted(contents.items())
            if name != MANIFEST_NAME
        }
        path.write_text(json.dumps(sealed(manifest), indent=2) + "\n", encoding="utf-8")

    return sign


@pytest.fixture(scope="session")
def change_step_weight(sign_again: Callable[[Path], None]) -> Callable[..., None]:
    """``change_step_weight(bundle, weight, factor)``: scale a weight of what makes steps in FP32, and sign again.

    That is the step graph, and the graph of one pass where a session steps with it.
    """

    def change(bundle: Path, weight: str, factor: float) -> None:
        import onnx

        for name in ("step", "prefill_pass"):
            path = bundle / "graphs" / f"{name}.fp32.onnx"
            graph = onnx.load(path)
            (tensor,) = [found for found in graph.graph.initializer if found.name == weight]
            values = onnx.numpy_helper.to_array(tensor) * torch.tensor(factor).numpy()
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), weight))
            onnx.save(graph, path)
        sign_again(bundle)

    return change


@pytest.fixture(scope="session")
def overflowing_token() -> int:
    """The one token whose h is infinite in every tiny bundle."""
    return int(importlib.import_module("tiny_bundles").OVERFLOWING_TOKEN)
