"""The gate catches every fault of the library, at the level that answers for it, and says where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_ladder as ladder
import pytest
from fault_bundle import SpoiledBundle
from faults import FAULTS, Fault

from crt_export.parity.levels import OWN_MODEL

#: Short windows of a tiny model: 8 of 32 tokens, what is needed to see a fault and not to measure one; the chain ends
#: before the windows do.
OPTIONS: dict[str, Any] = {
    "validation_tokens": 256,
    "window": 32,
    "chain_windows": 2,
    "chain_steps": 24,
    "prompts": 4,
    "new_tokens": 8,
    "short_reason": "fault injection",
    "threads": 1,
}


def test_the_sound_bundle_passes_every_level_that_judges_the_faults(parity_bundle: Path, heldout_text: Path) -> None:
    from crt_export.parity import ParityOptions, validate_bundle

    report = validate_bundle(
        parity_bundle, text=heldout_text, options=ParityOptions(levels=ladder.FAST_LEVELS, **OPTIONS)
    )
    assert report.passed, report.failures
    assert {result.level for result in report.levels} == {OWN_MODEL, *ladder.FAST_LEVELS}


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "fp32" in fault.caught], ids=lambda fault: fault.name)
def test_a_fault_is_caught_by_its_level(
    fault: Fault, spoiled: SpoiledBundle, heldout_text: Path, record_property: Callable[[str, object], None]
) -> None:
    found = ladder.catch(fault, spoiled, OPTIONS, text=heldout_text)
    record_property("fault", {"bundle": "two layers", **found.to_dict()})
    assert found.level == fault.caught["fp32"], found
    assert found.named, found
