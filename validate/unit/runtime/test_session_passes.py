"""Prefill with any number of passes, in chunks of any size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crt_export.bundle.manifest import sealed
from crt_export.errors import InputError, UnsupportedError
from crt_export.runtime import Session, load_bundle

CLOSE = {"rtol": 0, "atol": 2e-5}
COMPANY = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_passes_are_those_of_pytorch(crt: Any, passes: int) -> None:
    prompt, more = crt.ids(9), crt.ids(3, seed=1)
    session = crt.session()
    np.testing.assert_allclose(
        session.prefill([prompt], passes=passes)[0], crt.logits([prompt], [], passes=passes), **CLOSE
    )
    np.testing.assert_allclose(
        session.prefill([more], passes=passes)[0], crt.logits([prompt, more], [], passes=passes), **CLOSE
    )
    np.testing.assert_allclose(session.step([50])[0], crt.logits([prompt, more], [50], passes=passes), **CLOSE)


def test_the_number_of_passes_matters_so_their_test_can_fail(crt: Any) -> None:
    one, two = (crt.session().prefill([crt.ids(9)], passes=passes) for passes in (1, 2))
    assert np.abs(one - two).max() > 1e-3


def test_the_unrolled_graph_is_that_number_of_passes(crt: Any) -> None:
    rows = [crt.ids(7), crt.ids(4, seed=1)]
    unrolled, passes = (crt.session(batch=2).prefill(rows, passes=count) for count in (None, crt.passes))
    np.testing.assert_allclose(unrolled, passes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("passes", [8, 11])
def test_as_many_passes_as_tokens_are_the_sequential_recurrence(crt: Any, passes: int) -> None:
    prompt = crt.ids(8)
    with torch.no_grad():
        decoded, _ = crt.model.sequential(torch.tensor([prompt]))
        expected = crt.model.head(decoded.hidden[:, -1]).float().numpy()
    np.testing.assert_allclose(crt.session().prefill([prompt], passes=passes), expected, **CLOSE)


def test_rows_in_company_go_through_the_same_passes_and_chunks(crt: Any) -> None:
    rows = [crt.ids(9), crt.ids(2, seed=1), [], crt.ids(5, seed=2)]
    together = crt.session(batch=4)
    together.prefill([[60]] * 4)
    found = together.prefill(rows, passes=2, chunk=4)
    for row, prompt in enumerate(rows):
        alone = crt.session()
        expected = alone.prefill([[60]])
        if prompt:
            expected = alone.prefill([prompt], passes=2, chunk=4)
        np.testing.assert_allclose(found[row], expected[0], **COMPANY)
    assert together.position.tolist() == [10, 3, 1, 6]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 10, 32])
def test_chunks_of_any_size_are_prefills_one_after_the_other(either: Any, chunk: int) -> None:
    prompt = either.ids(10)
    found = either.session().prefill([prompt], chunk=chunk)
    parts = [prompt[begin : begin + chunk] for begin in range(0, 10, chunk)]
    np.testing.assert_allclose(found[0], either.logits(parts, []), **CLOSE)


def test_chunks_of_one_token_are_steps(either: Any) -> None:
    prompt = either.ids(6)
    stepping = either.session()
    for token in prompt:
        stepping.step([token])
    np.testing.assert_allclose(either.session().prefill([prompt], chunk=1), stepping.logits, **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 0}, "passes must be at least 1, found 0"),
        ({"passes": 1.5}, "passes must be a whole number, found 1.5"),
        ({"passes": True}, "passes must be a whole number"),
        ({"chunk": 0}, "chunk must be at least 1 and at most 32, found 0"),
        ({"chunk": 33}, "chunk must be at least 1 and at most 32, found 33"),
    ],
)
def test_impossible_passes_and_chunks_change_nothing(crt: Any, options: dict[str, Any], message: str) -> None:
    session = crt.session()
    with pytest.raises(InputError, match=message):
        session.prefill([[40]], **options)
    assert session.position.tolist() == [0]
    session.prefill([[40]])


def test_a_plain_transformer_has_no_passes(plain: Any) -> None:
    session = plain.session()
    with pytest.raises(UnsupportedError, match="this model has exactly one pass"):
        session.prefill([[40]], passes=2)
    session.prefill([[40]])


def test_a_bundle_without_the_graph_of_one_pass_runs_with_the_passes_it_was_built_with(
    crt_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(crt_path, tmp_path / "bundle"))
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for target in manifest["targets"].values():
        del target["graphs"]["prefill_pass"]
    path.write_text(json.dumps(sealed(manifest)))
    with load_bundle(folder, allow_unvalidated=True) as bundle:
        session: Session = bundle.session("ort-cpu-fp32")
        session.prefill([[40, 41]])
        with pytest.raises(UnsupportedError, match="this target has no prefill_pass graph"):
            session.prefill([[42]], passes=2)
        assert session.position.tolist() == [2]
        assert np.isfinite(session.step([42])).all()
