"""Values of the wrong type, shape or size in every public call: an InputError each, and nothing has changed."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from crt_export.errors import CrtExportError
from crt_export.runtime import (
    GenerationOptions,
    SamplingOptions,
    Session,
    Snapshot,
    generate_text,
    load_bundle,
    sample_token,
)


class _NoNumber:
    """Says that it is a number and a list, and is neither."""

    def __len__(self) -> int:
        raise TypeError("no length")

    def __iter__(self) -> Any:
        raise RuntimeError("no items")

    def __index__(self) -> int:
        raise ValueError("no number")

    def __float__(self) -> float:
        raise ValueError("no number")

    def __array__(self, *arguments: Any, **keywords: Any) -> np.ndarray:
        raise RuntimeError("no array")

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class _LongList(list[int]):
    """Has more items than it says."""

    def __len__(self) -> int:
        return 1


_VALUES: dict[str, Any] = {
    "none": None,
    "text": "text",
    "empty text": "",
    "lone surrogate": "\ud800",
    "zero byte": "a\0b",
    "bytes": b"\x01",
    "bytearray": bytearray(b"\x01"),
    "memoryview": memoryview(b"\x01\x02").cast("B", (1, 2)),
    "true": True,
    "float": 1.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "negative": -1,
    "huge": 10**400,
    "huge negative": -(10**5000),
    "beyond int64": 2**64,
    "complex": 1j,
    "decimal": Decimal("nan"),
    "fraction": Fraction(1, 3),
    "date": datetime.date(2000, 1, 1),
    "dict": {"a": 1},
    "dict of numbers": {0: 1},
    "set": {1.5},
    "list": [1.5],
    "list of none": [None],
    "list of text": ["a"],
    "list of bytes": [b"a"],
    "list of huge": [10**400],
    "list of nan": [float("nan")],
    "list of objects": [_NoNumber()],
    "list of arrays": [np.array(1.5)],
    "list of nested": [[[1]]],
    "ragged": [[1, [2]]],
    "list of dicts": [{}],
    "long": _LongList([1, 2]),
    "tuple": ((1.5,),),
    "generator": (number for number in (1.5,)),
    "range": range(3, 9),
    "iterator": iter(["a", 1]),
    "function": len,
    "type": int,
    "object": object(),
    "no number": _NoNumber(),
    "0-dimensional": np.array(3),
    "0-dimensional float": np.array(1.5),
    "0-dimensional text": np.array("a"),
    "0-dimensional object": np.array(None, object),
    "scalar": np.float32(1.5),
    "scalar nan": np.float64("nan"),
    "scalar huge": np.uint64(2**64 - 1),
    "scalar date": np.datetime64("2000-01-01"),
    "scalar bool": np.bool_(True),
    "matrix": np.ones((1, 2, 2), np.int64),
    "floats": np.array([1.5]),
    "objects": np.array([object()]),
    "object integers": np.array([[10**400]], object),
    "texts": np.array(["a"]),
    "bools": np.array([True]),
    "no rows": np.zeros((0, 3), np.int64),
    "structured": np.zeros(1, [("a", np.int64)]),
    "masked": np.ma.masked_array([1], [True]),
}

#: What some call takes, by the name of the value; everything else must be refused.
_SESSION: dict[str, tuple[Callable[[Session, Any], Any], set[str]]] = {
    "step": (lambda session, value: session.step(value), set()),
    "step of a row": (lambda session, value: session.step([value]), set()),
    "advance": (lambda session, value: session.advance(value), set()),
    "prefill": (lambda session, value: session.prefill(value), set()),
    "prefill of a row": (lambda session, value: session.prefill([value]), {"range", "long"}),
    "prefill of a token": (lambda session, value: session.prefill([[value]]), {"0-dimensional"}),
    "passes": (
        lambda session, value: session.prefill([[40]], passes=value),
        {"none", "huge", "beyond int64", "scalar huge"},
    ),
    "chunk": (lambda session, value: session.prefill([[40]], chunk=value), {"none"}),
    "generate": (lambda session, value: session.generate(value), {"none"}),
    "generate after a row": (lambda session, value: session.generate([value]), {"range", "long"}),
    "generation options": (lambda session, value: session.generate([[40]], value), {"none"}),
    "on_token": (
        lambda session, value: session.generate([[40]], on_token=value),
        {"none", "function", "type"},
    ),
    "restore": (lambda session, value: session.restore(value), set()),
    "restore tensors": (
        lambda session, value: session.restore(Snapshot(bundle="a", target="b", tensors=value)),
        set(),
    ),
}
_OPTIONS = ("max_new_tokens", "sampling", "stop_token_ids", "stop_strings", "ignore_eos", "passes")
_SAMPLING = tuple(field.name for field in fields(SamplingOptions))
_BUNDLE = ("target", "batch", "threads", "capacity", "on_full")


def raised_by(call: Callable[[], Any]) -> str:
    """What a call raised that it should not; empty for a refusal in the package's own words, or none at all."""
    try:
        call()
    except CrtExportError:
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return ""


def accepted(call: Callable[[], Any]) -> bool:
    try:
        call()
    except CrtExportError:
        return False
    return True


def fresh(name: str) -> Any:
    """The value; what is used up by being read, anew."""
    made: dict[str, Callable[[], Any]] = {
        "generator": lambda: (number for number in (1.5,)),
        "iterator": lambda: iter(["a", 1]),
    }
    return made[name]() if name in made else _VALUES[name]


@pytest.mark.parametrize("call", _SESSION)
def test_a_session_refuses_what_it_cannot_take_and_stays_as_it_was(crt: Any, call: str) -> None:
    run, taken = _SESSION[call]
    with crt.session(capacity=16) as session, crt.session(capacity=16) as twin:
        for each in (session, twin):
            each.prefill([[40, 41, 42]])
        wrong = {name: found for name in _VALUES if (found := raised_by(lambda n=name: run(session, fresh(n))))}
        assert not wrong
        session.reset()
        session.prefill([[40, 41, 42]])
        let_in = {name for name in _VALUES if name not in taken and accepted(lambda n=name: run(session, fresh(n)))}
        assert not let_in
        assert session.position.tolist() == twin.position.tolist()
        np.testing.assert_array_equal(session.logits, twin.logits)
        np.testing.assert_array_equal(session.step([50]), twin.step([50]))


@pytest.mark.parametrize(
    "call",
    [
        *(f"GenerationOptions {name}" for name in _OPTIONS),
        *(f"SamplingOptions {name}" for name in _SAMPLING),
        *(f"Snapshot {name}" for name in ("bundle", "target", "tensors")),
        *(f"sample_token {name}" for name in ("row", "step")),
        *(f"session {name}" for name in _BUNDLE),
        *(f"generate_text {name}" for name in ("prompt", "options", "target", "on_token")),
        *(f"load_bundle {name}" for name in ("path", "allow_unvalidated", "identity")),
        *(f"tokenizer {name}" for name in ("encode", "decode", "stream")),
        "tokenizer.encode parse_special",
        "Snapshot.load path",
        "Snapshot.save path",
    ],
)
def test_options_and_bundles_raise_errors_of_the_package_only(
    crt: Any, tmp_path: Any, monkeypatch: Any, call: str
) -> None:
    monkeypatch.chdir(tmp_path)
    what, name = call.split()
    snapshot = Snapshot(bundle="a", target="b", tensors={})
    calls: dict[str, Callable[[Any], Any]] = {
        "GenerationOptions": lambda value: GenerationOptions(**{name: value}),
        "SamplingOptions": lambda value: SamplingOptions(**{name: value}),
        "Snapshot": lambda value: Snapshot(**{"bundle": "a", "target": "b", "tensors": {}, name: value}),
        "sample_token": lambda value: sample_token(
            np.zeros(4, np.float32), SamplingOptions(), **{"row": 0, "step": 0, name: value}
        ),
        "session": lambda value: crt.bundle.session(**{"target": "ort-cpu-fp32", name: value}).close(),
        "generate_text": lambda value: generate_text(crt.bundle, **{"prompt": "a", name: value}).close(),
        "load_bundle": lambda value: load_bundle(**{"path": crt.bundle.files.path, name: value}).close(),
        "tokenizer": lambda value: getattr(crt.bundle.tokenizer, name)(value),
        "tokenizer.encode": lambda value: crt.bundle.tokenizer.encode("a", **{name: value}),
        "Snapshot.load": lambda value: Snapshot.load(value),
        "Snapshot.save": lambda value: snapshot.save(value),
    }
    wrong = {key: found for key in _VALUES if (found := raised_by(lambda k=key: calls[what](fresh(k))))}
    assert not wrong
