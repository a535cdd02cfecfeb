"""Prompts are taken alike in both languages: the target's choice out of the manifest, and what a call asks for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from crt_export.bundle.manifest import sealed
from crt_export.errors import BundleError, UnsupportedError
from crt_export.runtime import GenerationOptions, load_bundle

TARGET = "ort-cpu-fp32"
CLOSE = {"rtol": 0, "atol": 1e-5}
WORDS = {None: 0, "exact": -1, "adaptive": -2}
ROWS = [[65 + index for index in range(11)], [70, 71], [80, 81, 82, 83, 84]]
PLAN = {"passes": 3, "chunk": 6, "shortest": 3, "residual_bound": 0.05, "perplexity_gap": 0.004}
PLANS: dict[str, dict[str, Any]] = {
    "steps": {**PLAN, "method": "steps"},
    "passes": {**PLAN, "method": "passes", "passes": 2},
    "passes it was built with": {**PLAN, "method": "passes", "passes": 3},  # unroll of the bundle
    "adaptive": {**PLAN, "method": "adaptive"},
    "adaptive, never reached": {**PLAN, "method": "adaptive", "residual_bound": 1e-12},
    "adaptive, at once": {**PLAN, "method": "adaptive", "residual_bound": 1e6},
}


def planned(tiny: Path, folder: Path, plan: dict[str, Any]) -> Path:
    """The tiny bundle with another choice of its target."""
    bundle = Path(shutil.copytree(tiny, folder / "demo"))
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["targets"][TARGET]["prefill"] = plan
    path.write_text(json.dumps(sealed(manifest)), "utf-8")
    return bundle


@pytest.mark.parametrize("name", PLANS)
def test_every_way_of_a_prefill_agrees(name: str, tiny: Path, tmp_path: Path, library: Any) -> None:
    plan = PLANS[name]
    path = planned(tiny, tmp_path, plan)
    in_c = library.bundle(path)
    with load_bundle(path, allow_unvalidated=True) as in_python:
        for passes in (None, "exact", "adaptive", 2):
            sessions = in_python.session(TARGET, batch=3), in_c.session(TARGET, batch=3)
            number = WORDS.get(passes, passes)  # type: ignore[arg-type]
            expected = sessions[0].prefill(ROWS, passes=passes), sessions[0].step([90, None, 91])
            found = sessions[1].prefill(ROWS, passes=number), sessions[1].step([90, None, 91])
            np.testing.assert_allclose(found, expected, **CLOSE)
            np.testing.assert_array_equal(sessions[1].position, sessions[0].position)
            np.testing.assert_array_equal(sessions[1].next_tokens, sessions[0].next_tokens)
        options = GenerationOptions(max_new_tokens=5, passes="exact")
        (wanted,) = zip(*in_python.session(TARGET).generate(ROWS[:1], options), strict=True)
    assert in_c.session(TARGET).generate(ROWS[:1], max_new_tokens=5, passes=-1).run() == [list(wanted)]


@pytest.mark.parametrize("passes", [0, 1, 2, 3, 10])
def test_a_row_has_the_bits_it_has_alone(in_c: Any, passes: int) -> None:
    """Rows of unequal length never share a call on a CPU, so padding reaches nobody's sums."""
    for rows in ([[65, 66, 67], [70]], [[65, 66, 67], [70 + index for index in range(17)]], [[80, 81]] * 3, ROWS):
        together = in_c.session(TARGET, batch=len(rows))
        found = [together.prefill(rows, passes=passes), together.step([90] * len(rows))]
        for row, prompt in enumerate(rows):
            alone = in_c.session(TARGET)
            np.testing.assert_array_equal(alone.prefill([prompt], passes=passes)[0], found[0][row])
            np.testing.assert_array_equal(alone.step([90])[0], found[1][row])


def test_exact_is_a_step_for_every_token(in_c: Any) -> None:
    session, stepped = in_c.session(TARGET), in_c.session(TARGET)
    found = session.prefill(ROWS[:1], passes=-1)
    wanted = [stepped.step([token]) for token in ROWS[0]]
    np.testing.assert_array_equal(found, wanted[-1])


def test_both_refuse_adaptive_without_a_bound(tiny: Path, tmp_path: Path, library: Any, c_library: ModuleType) -> None:
    path = planned(tiny, tmp_path, {**PLAN, "method": "passes", "residual_bound": None})
    with (
        load_bundle(path, allow_unvalidated=True) as bundle,
        pytest.raises(UnsupportedError) as in_python,
    ):
        bundle.session(TARGET).prefill([[65]], passes="adaptive")
    with pytest.raises(c_library.CrtError) as in_cpp:
        library.bundle(path).session(TARGET).prefill([[65]], passes=-2)
    assert in_cpp.value.kind == "unsupported"
    for text in (str(in_python.value), in_cpp.value.message):
        assert "no bound for the residual" in text


@pytest.mark.parametrize(
    "plan",
    [
        {**PLAN, "method": "guess"},
        {**PLAN, "method": "adaptive", "residual_bound": None},
        {
            **PLAN,
            "method": "steps",
            "passes": 0,
            "chunk": -1,
            "shortest": 0,
            "residual_bound": 0,
            "perplexity_gap": -0.5,
        },
        {**PLAN, "method": "steps", "passes": 1.5, "residual_bound": "small"},
        {"method": "steps"},
        [],
    ],
    ids=["method", "no bound", "numbers", "types", "missing", "no object"],
)
def test_both_refuse_an_unusable_choice(
    plan: Any, tiny: Path, tmp_path: Path, library: Any, c_library: ModuleType
) -> None:
    path = planned(tiny, tmp_path, plan)
    with pytest.raises(BundleError, match="prefill"):
        load_bundle(path, allow_unvalidated=True)
    with pytest.raises(c_library.CrtError, match="prefill") as in_cpp:
        library.bundle(path)
    assert in_cpp.value.kind == "bundle"
