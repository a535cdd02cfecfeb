"""The C++ library, what to load into it, and the same model in Python."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crt_export.pipeline import BuildOptions, build
from crt_export.runtime import Bundle, load_bundle

TinyBundle = Callable[..., tuple[Path, Any]]


if str(Path(__file__).parent) not in sys.path:  # for c_library.py; pytest's import mode leaves the path alone
    sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def c_library() -> ModuleType:
    """The module c_library.py beside this file."""
    return importlib.import_module("c_library")


@pytest.fixture(scope="session")
def library(c_library: ModuleType, cpp_build: Path) -> Any:
    """The C API of the built library."""
    return c_library.Library(cpp_build / "libcrt_runtime.so")


@pytest.fixture(scope="session")
def tiny(tiny_bundle: TinyBundle) -> Path:
    """A recurrent model of one layer."""
    return tiny_bundle("crt", num_hidden_layers=1, unroll_steps=3)[0]


@pytest.fixture(scope="session")
def windowed(tiny_bundle: TinyBundle) -> Path:
    """A recurrent model of two layers with an attention window."""
    return tiny_bundle("windowed", num_hidden_layers=2, unroll_steps=2, sliding_window=6)[0]


@pytest.fixture(scope="session")
def in_python(tiny: Path) -> Iterator[Bundle]:
    """The tiny bundle in Python."""
    with load_bundle(tiny, allow_unvalidated=True) as bundle:
        yield bundle


@pytest.fixture(scope="session")
def in_c(library: Any, tiny: Path) -> Any:
    """The tiny bundle through the C API."""
    return library.bundle(tiny)


@pytest.fixture(scope="session")
def demo(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, shared_traces: None) -> Path:
    """The trained demo for both CPU targets."""
    output = tmp_path_factory.mktemp("demo") / "bundle"
    targets = ("ort-cpu-fp32", "ort-cpu-int8")
    build(BuildOptions(checkpoint=demo_checkpoint, output=output, targets=targets, validated=False, reference=False))
    return output
