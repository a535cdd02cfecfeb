"""Gate of the validation text: agreement on a text outside the model's domain proves little.

A bundle's own report records how well PyTorch FP32 predicted the text it was built on. If the model had learnt that and
now predicts worse than a uniform guess would, the text is not the model's: another tokenizer, random bytes. What the
tokens show of being text without asking any model (:func:`crt_export.quantize.text.text_evidence`) sharpens this: of
tokens that look random or shuffled, half of what the model knew of its own text is asked. Shuffled bytes keep their
histogram, so a trained model may predict them better than a uniform guess: the demo with 5.34 nat, and its own text
with 1.59 (512 tokens, ``validate/parity/test_corpus.py``), where a uniform guess costs 5.55.

Without such a record, as during a build, nothing is gated: untrained models are exported too, and for them every text
is as good as noise. It is noted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from crt_export.parity.metrics import measured
from crt_export.parity.report import Comparison, LevelResult, corpus_result
from crt_export.parity.setup import ParitySetup
from crt_export.quantize.text import TextEvidence, text_evidence

TARGET = "pytorch-fp32"
#: Tokens looked at without the model: enough for its statistics, and a fraction of a second.
_EVIDENCE_TOKENS = 16_384
_SHORTEST_WINDOW = 3


def check_text(
    setup: ParitySetup, nll: float, comparisons: Sequence[Comparison] = (), *, notes: Sequence[str] = ()
) -> LevelResult:
    """Judge the text by how well the reference predicts it.

    Args:
        setup: Windows, and the recorded likelihood if there is one.
        nll: Mean negative log-likelihood of the text under PyTorch FP32 token by token, nats.
        comparisons: What else the corpus level has of PyTorch FP32: its regime gap.
        notes: Of the level.

    Returns:
        One check, gated where a report was recorded of a model that had learnt its text. ``data``: ``regimes`` and
        ``text``: ``nll``, ``uniform_nll``, ``recorded_nll``,
        ``repetition`` and ``dependence`` (of noise 1 and 0), None where unknown.
    """
    uniform, recorded = math.log(setup.config.vocab_size), setup.recorded_nll
    evidence = _evidence(setup)
    doubts = "; ".join(evidence.problems) if evidence is not None else ""
    limit = _limit(recorded, uniform, setup.tolerances.learnt_share, doubtful=bool(doubts))
    passed = None if limit is None else nll < limit
    failures = ()
    if passed is False:
        looks = f", and it looks random or shuffled ({doubts})" if doubts else ""
        failures = (
            f"this is not text the model knows: PyTorch FP32 predicts it with {nll:.3f} nat per token, expected less "
            f"than {limit:.3f}; a uniform guess costs {uniform:.3f} and the bundle's report records {recorded:.3f}"
            f"{looks}: validate on text like that which the model was trained on, encoded by its own tokenizer",
        )
    elif doubts:
        notes = (
            *notes,
            f"the validation text looks random or shuffled ({doubts}): its figures say little about real text",
        )
    check = measured("text_nll", "text", nll, limit=limit, failures=failures)
    text = {
        "nll": nll,
        "uniform_nll": uniform,
        "recorded_nll": recorded,
        "repetition": None if evidence is None else evidence.repetition,
        "dependence": None if evidence is None else evidence.dependence,
    }
    return corpus_result(TARGET, comparisons, check, notes=notes, text=text)


def _limit(recorded: float | None, uniform: float, learnt_share: float, *, doubtful: bool) -> float | None:
    if recorded is None or recorded > learnt_share * uniform:
        return None
    return (recorded + uniform) / 2 if doubtful else uniform


def _evidence(setup: ParitySetup) -> TextEvidence | None:
    """None where windows are too short to see neighbours in."""
    tokens = setup.windows.inputs
    if tokens.shape[1] < _SHORTEST_WINDOW:
        return None
    return text_evidence(tokens[: max(1, _EVIDENCE_TOKENS // tokens.shape[1])], setup.config.vocab_size)
