"""Levels of evidence in the order they run: their names, what each one asks, and the function that answers.

Every level but two is one function ``(ParityCase, ParitySetup) -> LevelResult``; later levels ask more of a target than
earlier ones. ``own-model`` looks at what all targets are compared with, ``corpus`` at all targets at once.

======================  ==============  ==========================================================================
level                   module          question
======================  ==============  ==========================================================================
``own-model``           own_model       Does the reference compute what the user's own PyTorch model does? (--expect)
L0 ``contract``         contract        Are the files what was agreed: names, dtypes, operators, weights, nothing else?
L1 ``one-step``         one_step        One call from the reference's own state: is every output tensor right?
                        interchange     Are graphs that no session opens, to the bit, what a session computes?
L2 ``chain``            chain           Fed its own state for many steps: which tensor leaves the reference first?
L3 ``corpus``           corpus          On a text: likelihood, divergence and agreement, with confidence intervals.
L4 ``free-running``     free_running    Fed its own tokens: how long does it say the same?
L5 ``certificate``      certificate     Do K parallel passes and the recurrence agree, for every K, after quantisation?
``long-run``            long_run        Does the error grow over twenty thousand tokens?
======================  ==============  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crt_export.parity.report import LevelResult
    from crt_export.parity.setup import ParityCase, ParitySetup

OWN_MODEL = "own-model"
CONTRACT = "contract"
ONE_STEP = "one-step"
CHAIN = "chain"
CORPUS = "corpus"
FREE_RUNNING = "free-running"
CERTIFICATE = "certificate"
LONG_RUN = "long-run"

LEVELS = (OWN_MODEL, CONTRACT, ONE_STEP, CHAIN, CORPUS, FREE_RUNNING, CERTIFICATE, LONG_RUN)
#: What ``crt-export validate`` runs unless told otherwise; the own model is another file, the long run takes minutes:
#: both are asked for.
VALIDATE_LEVELS = LEVELS[1:7]

#: What a verdict says where the level ``own-model`` had no outputs of the user's own model to compare with.
NOT_COMPARED = "not compared with your own model"
#: Begins the note of a report that repeats what an earlier one of the same checkpoint says of the user's own model.
WHEN_BUILT = "when the bundle was built"

_FUNCTIONS = {
    CONTRACT: ("contract", "check_contract_level"),
    ONE_STEP: ("one_step", "check_one_step"),
    CHAIN: ("chain", "check_chain"),
    FREE_RUNNING: ("free_running", "check_free_running"),
    CERTIFICATE: ("certificate", "certify"),
    LONG_RUN: ("long_run", "check_long_run"),
}


def level_function(level: str) -> Callable[[ParityCase, ParitySetup], LevelResult]:
    """The function of a level; its module, and PyTorch with it, is imported when it is first needed."""
    module, name = _FUNCTIONS[level]
    return getattr(import_module(f"crt_export.parity.{module}"), name)
