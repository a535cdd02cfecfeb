"""The function of every level but the corpus, which looks at all targets at once."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from crt_export.ladder import CERTIFICATE, CHAIN, CONTRACT, FREE_RUNNING, LONG_RUN, ONE_STEP
from crt_export.parity.case import ParityCase
from crt_export.parity.level import LevelResult, ParitySetup

_FUNCTIONS = {
    CONTRACT: ("contract", "check_contract_level"),
    ONE_STEP: ("one_step", "check_one_step"),
    CHAIN: ("chain", "check_chain"),
    FREE_RUNNING: ("free_running", "check_free_running"),
    CERTIFICATE: ("certificate", "certify"),
    LONG_RUN: ("long_run", "check_long_run"),
}


def level_function(level: str) -> Callable[[ParityCase, ParitySetup], LevelResult]:
    """The function of a level; its module is imported when it is first needed."""
    module, name = _FUNCTIONS[level]
    return getattr(import_module(f"crt_export.parity.{module}"), name)
