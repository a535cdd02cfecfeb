"""What an application in Python does with a file, every stage of it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from seeds import (
    BUNDLE,
    CHECKPOINT,
    PROFILE,
    SIDECAR,
    SIDECAR_GPU,
    SIDECAR_VERSION,
    SNAPSHOT,
    TARGET,
    TOKENIZER,
    sidecar_contract,
)
from stages import Finding, Stages

from crt_export import cli
from crt_export.bundle import external_tensors
from crt_export.engine.tensorrt.sidecar import EngineFile, read_sidecar
from crt_export.errors import CrtExportError
from crt_export.profile import load_profile
from crt_export.runtime import Bundle, Snapshot, load_bundle
from crt_export.selftest import run_selftest
from crt_export.tokenizer import ByteTokenizer, load_tokenizer

PROMPT = [5, 6, 7]
STEP = 8
#: Targets of one bundle that are tried.
MOST_TARGETS = 3
#: Every so many cases go through the command line too.
CLI_EVERY = 10
#: Kinds whose input is a bundle.
OF_BUNDLES = ("manifest", "onnx", "vectors", "profile")
_EXIT_CODES = {0, 1, 2, 3}


class PythonProbe:
    """Tries the inputs of one process; what is sound is opened once."""

    def __init__(self, seeds: Path) -> None:
        self._sound: Bundle = load_bundle(seeds / BUNDLE)
        self._session = self._sound.session(TARGET, threads=1)
        self._model = self._sound.model
        self._count = 0

    def probe(self, kind: str, folder: Path, ids: list[int]) -> Stages:
        """Run every stage of a kind.

        Raises:
            Finding: Something came out that never may.
        """
        stages = Stages((CrtExportError,))
        probes: dict[str, Callable[[Stages, Path], object]] = {
            "snapshot": self._snapshot,
            "safetensors": _checkpoint,
            "sidecar": self._sidecar,
            "profile": _profile,
            "tokenizer": self._tokenizer,
            "vectors": _vectors,
            "onnx": _graphs,
        }
        probes.get(kind, _bundle)(stages, folder)
        if kind == "tokenizer":
            stages.give("decode", ByteTokenizer(self._model).decode(ids))
        if kind in OF_BUNDLES:
            self._count += 1
            if self._count % CLI_EVERY == 0:
                _command_line(stages, folder, self._count // CLI_EVERY)
        return stages

    def _snapshot(self, stages: Stages, folder: Path) -> None:
        session = self._session
        session.reset()
        before = session.prefill([PROMPT])
        snapshot = stages.run("load", lambda: Snapshot.load(folder / SNAPSHOT))
        if snapshot is None:
            return
        stages.run("restore", lambda: session.restore(snapshot))
        if stages.verdicts["restore"] == "refused" and not np.array_equal(session.logits, before):
            raise Finding("restore: a refused snapshot changed the session")
        stages.run("step", lambda: _finite("step", session.step([STEP])))

    def _sidecar(self, stages: Stages, folder: Path) -> None:
        profile, contract = sidecar_contract(self._model)
        path = folder / SIDECAR
        readers = {"read_plan": lambda: b"", "read_sidecar": path.read_bytes}
        known = {field.name for field in dataclasses.fields(EngineFile)}
        values: Any = {name: reader for name, reader in readers.items() if name in known}
        file = EngineFile(
            graph="step", path=folder / "step.engine", sidecar=path, contract=contract, unroll=1, **values
        )
        stages.run("sidecar", lambda: read_sidecar(file, profile, SIDECAR_GPU, SIDECAR_VERSION))

    def _tokenizer(self, stages: Stages, folder: Path) -> None:
        model = dataclasses.replace(self._model, tokenizer="tokenizer.json", vocab_size=400)
        tokenizer = stages.run("tokenizer", lambda: load_tokenizer(folder / TOKENIZER, model))
        if tokenizer is None:
            return
        stages.run("encode", lambda: tokenizer.encode_prompt("the quick <end> café\n\U0001f600 "))
        some = [0, 1, 3, 299, 300, 399, 40, 41, 2]
        stages.run("text", lambda: tokenizer.decode(some))
        stream = tokenizer.stream()
        stages.run("stream", lambda: [*map(stream.push, some), stream.finish()])


def _bundle(stages: Stages, folder: Path) -> None:
    bundle = stages.run("open", lambda: load_bundle(folder / BUNDLE, allow_unvalidated=True))
    if bundle is None:
        return
    with bundle:
        for target in bundle.targets[:MOST_TARGETS]:
            _session(stages, bundle, target)
        stages.run("verify", bundle.files.verify_all)


def _session(stages: Stages, bundle: Bundle, target: str) -> None:
    session = stages.run(f"session {target!a}", lambda: bundle.session(target, threads=1))
    if session is None:
        return
    with session:
        if stages.run(f"prefill {target!a}", lambda: _finite("prefill", session.prefill([PROMPT]))) is not None:
            stages.run(f"step {target!a}", lambda: _finite("step", session.step([STEP])))


def _graphs(stages: Stages, folder: Path) -> None:
    graphs = sorted((folder / BUNDLE / "graphs").glob("*.fp32.onnx"))
    for graph in graphs:
        found = stages.run(f"external {graph.name}", lambda graph=graph: external_tensors(graph))
        stages.give(f"locations {graph.name}", None if found is None else [one.location for one in found])
    _bundle(stages, folder)


def _vectors(stages: Stages, folder: Path) -> None:
    report = stages.run("selftest", lambda: run_selftest(folder / BUNDLE))
    stages.give("selftest exit code", 2 if report is None else report.exit_code)


def _profile(stages: Stages, folder: Path) -> None:
    stages.run("profile", lambda: load_profile(folder / PROFILE))
    _bundle(stages, folder)


def _checkpoint(stages: Stages, folder: Path) -> None:
    from crt_export.checkpoint import load_checkpoint  # torch: only for this kind

    stages.run("checkpoint", lambda: load_checkpoint(folder / CHECKPOINT))


def _finite(what: str, logits: np.ndarray) -> np.ndarray:
    if not np.isfinite(logits).all():
        raise Finding(f"{what}: logits are not finite, and no error says so")
    return logits


def _command_line(stages: Stages, folder: Path, turn: int) -> None:
    """One verb, in turns; its exit code must be one of the documented ones, and never that of a bug."""
    bundle = str(folder / BUNDLE)
    generate = ["generate", bundle, "--target", TARGET, "--prompt", "ab", "--max-new-tokens", "2"]
    verb = (["inspect", bundle], ["selftest", bundle], generate)[turn % 3]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code: Any = stages.run(f"cli {verb[0]}", lambda: cli.main(verb))
    if code not in _EXIT_CODES:
        raise Finding(f"cli {verb[0]}: exit code {code}: {said.getvalue()[-400:]}")
