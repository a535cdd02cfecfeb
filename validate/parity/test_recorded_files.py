"""What ran and what ships: the files that evidence opens of a target are those that a session opens, and no others.

Besides them are ``step`` and ``prefill`` of a target for a CPU, which one check ties to the graph of its sessions, and
``head``, through which validation makes logits of hidden states. The contract level, which runs nothing, reads all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from crt_export.bundle import open_bundle
from crt_export.checkpoint import Checkpoint
from crt_export.parity import ParityOptions, check_parity
from crt_export.parity.check import case_from_manifest
from crt_export.parity.levels import CERTIFICATE, CHAIN, CONTRACT, CORPUS, FREE_RUNNING, ONE_STEP
from crt_export.runtime import Bundle
from crt_export.text import TokenText

#: Every level that runs a target, as short as it gets.
LEVELS = (ONE_STEP, CHAIN, CORPUS, FREE_RUNNING, CERTIFICATE)
SHORT = {
    "validation_tokens": 64,
    "window": 32,
    "chain_windows": 2,
    "chain_steps": 8,
    "prompts": 2,
    "new_tokens": 4,
    "short_reason": "which files are opened",
    "threads": 1,
}
BESIDE = ("step", "prefill", "head")


def _of_evidence(
    bundle: Path, checkpoint: Checkpoint, text: TokenText, target: str, levels: tuple[str, ...]
) -> set[str]:
    files = open_bundle(bundle, allow_unvalidated=True)
    report = check_parity(
        checkpoint, [case_from_manifest(files, target)], text, options=ParityOptions(levels=levels, **SHORT)
    )
    assert {result.level for result in report.levels} >= set(levels)
    return set(files.used)


def _of_a_session(bundle: Path, text: TokenText, target: str) -> set[str]:
    files = open_bundle(bundle, allow_unvalidated=True)
    with Bundle(files) as opened:
        session = opened.session(target, threads=1)
        session.prefill([text.ids[:8]], passes=3)
        session.step([1])
    return set(files.used)


@pytest.mark.parametrize("target", ["ort-cpu-fp32", "ort-cpu-int8"])
def test_evidence_opens_what_a_session_opens(
    three_targets: Path, parity_checkpoint: Checkpoint, real_text: TokenText, target: str
) -> None:
    evidence = _of_evidence(three_targets, parity_checkpoint, real_text, target, LEVELS)
    session = _of_a_session(three_targets, real_text, target)
    graphs = open_bundle(three_targets, allow_unvalidated=True).manifest["targets"][target]["graphs"]
    beside = {graphs[name] for name in BESIDE}
    assert evidence == session | beside, _sets(evidence, session)
    assert not session & beside, _sets(evidence, session)
    assert graphs["prefill_pass"] in session


@pytest.mark.parametrize("level", [CHAIN, CERTIFICATE])
def test_only_the_one_step_level_opens_graphs_beside_those_of_a_session(
    three_targets: Path, parity_checkpoint: Checkpoint, real_text: TokenText, level: str
) -> None:
    evidence = _of_evidence(three_targets, parity_checkpoint, real_text, "ort-cpu-fp32", (level,))
    session = _of_a_session(three_targets, real_text, "ort-cpu-fp32")
    graphs = open_bundle(three_targets, allow_unvalidated=True).manifest["targets"]["ort-cpu-fp32"]["graphs"]
    assert evidence - {graphs["head"]} == session, _sets(evidence, session)


def test_the_contract_is_checked_of_every_graph(
    three_targets: Path, parity_checkpoint: Checkpoint, real_text: TokenText
) -> None:
    evidence = _of_evidence(three_targets, parity_checkpoint, real_text, "ort-cpu-fp32", (CONTRACT,))
    graphs = open_bundle(three_targets, allow_unvalidated=True).manifest["targets"]["ort-cpu-fp32"]["graphs"]
    assert evidence >= set(graphs.values())


def _sets(evidence: set[str], session: set[str]) -> str:
    return f"evidence opened {sorted(evidence)}, a session opened {sorted(session)}"
