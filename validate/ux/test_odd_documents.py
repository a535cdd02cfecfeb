"""No exit 70 from any value in a manifest or a report: every verb that reads one answers, or refuses with code 2."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crt_export.cli import main

Place = tuple[str | int, ...]
ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.0,
    0.5,
    1e300,
    2**62,
    "",
    "x\x1b[2J",
    "\x9b\u202e",
    [],
    [[]],
    {},
    {"a": []},
)
EVIL = ("\x1b", "\x9b", "\u202e")
QUICK, THOROUGH = 30, 600


def places(node: Any, at: Place = ()) -> Iterator[Place]:
    """Where a document can be changed; of a list the first two items, since the others are like them."""
    if at:
        yield at
    if isinstance(node, dict):
        for key, value in node.items():
            yield from places(value, (*at, key))
    elif isinstance(node, list):
        for index, value in enumerate(node[:2]):
            yield from places(value, (*at, index))


def changed(document: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    result: Any = copy.deepcopy(document)
    inner = result
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return result


def samples(document: dict[str, Any], count: int, *, without: tuple[str, ...] = ()) -> list[tuple[Place, Any]]:
    """The same places and values every time."""
    choice = random.Random(12)
    every = [place for place in places(document) if place[0] not in without]
    return [(choice.choice(every), choice.choice(ODD)) for _ in range(count)]


@pytest.fixture
def golden(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "validate" / "golden" / "bundle-v1", tmp_path / "bundle"))


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """``answer(place, value, *arguments)``: run a verb in this process; it must end well and say nothing evil."""

    def run(place: Place, value: Any, *arguments: str) -> None:
        code = main(arguments)
        captured = capsys.readouterr()
        assert code in (0, 1, 2, 3), (place, value, arguments, captured.err)
        assert not [c for c in EVIL if c in captured.out + captured.err], (place, value, arguments)

    return run


def check_manifest(count: int, golden: Path, sign_again: Callable[[Path], None], answer: Callable[..., None]) -> None:
    path = golden / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for number, (place, value) in enumerate(samples(manifest, count, without=("files",))):
        path.write_text(json.dumps(changed(manifest, place, value)), encoding="utf-8")
        sign_again(golden)
        answer(place, value, "inspect", str(golden))
        answer(place, value, "inspect", str(golden), "--json")
        answer(place, value, "compare", str(golden), str(golden))
        if number % 4 == 0 and place[0] != "parity":
            answer(place, value, "generate", str(golden), "--prompt", "ab", "--max-new-tokens", "2")
            answer(place, value, "selftest", str(golden))


def check_report(count: int, root: Path, folder: Path, answer: Callable[..., None]) -> None:
    old, new = root / "validate" / "golden" / "bundle-v1" / "report.json", folder / "report.json"
    report = json.loads(old.read_text(encoding="utf-8"))
    page, cases = folder / "page.html", folder / "cases.xml"
    for number, (place, value) in enumerate(samples(report, count)):
        new.write_text(json.dumps(changed(report, place, value)), encoding="utf-8")
        answer(place, value, "compare", str(old), str(new), "--json")
        answer(place, value, "compare", str(new), str(old), "--junit", str(cases))
        if number % 10 == 0:
            answer(place, value, "report", str(new), "--output", str(page), "--junit", str(cases))
        written = "".join(file.read_text(encoding="utf-8") for file in (page, cases) if file.exists())
        assert not [c for c in EVIL if c in written], (place, value)


def test_odd_manifests(golden: Path, sign_again: Callable[[Path], None], answer: Callable[..., None]) -> None:
    check_manifest(QUICK, golden, sign_again, answer)


def test_odd_reports(root: Path, tmp_path: Path, answer: Callable[..., None]) -> None:
    check_report(QUICK, root, tmp_path, answer)


@pytest.mark.evidence
@pytest.mark.timeout(1200)
def test_many_odd_manifests(golden: Path, sign_again: Callable[[Path], None], answer: Callable[..., None]) -> None:
    check_manifest(THOROUGH, golden, sign_again, answer)


@pytest.mark.evidence
@pytest.mark.timeout(1200)
def test_many_odd_reports(root: Path, tmp_path: Path, answer: Callable[..., None]) -> None:
    check_report(THOROUGH, root, tmp_path, answer)


@pytest.mark.parametrize("levels", [[[]], 1, [{"target": []}], {}, [0], ["own-model"]], ids=str)
def test_inspect_refuses_a_parity_report_that_is_none(
    golden: Path, sign_again: Callable[[Path], None], capsys: pytest.CaptureFixture[str], levels: Any
) -> None:
    path = golden / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "levels": levels}), encoding="utf-8")
    sign_again(golden)
    for options in ([], ["--json"]):
        assert main(["inspect", str(golden), *options]) == 2
        captured = capsys.readouterr()
        assert not captured.out
        assert f"error: {path}: a parity report that is damaged" in captured.err


@pytest.mark.parametrize("name", ["manifest.json", "absent.json", "../report.json", 3, None, ["report.json"]], ids=str)
def test_inspect_refuses_a_report_that_the_bundle_does_not_list(
    golden: Path, sign_again: Callable[[Path], None], capsys: pytest.CaptureFixture[str], name: Any
) -> None:
    path = golden / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(changed(manifest, ("parity", "report"), name)), encoding="utf-8")
    sign_again(golden)
    assert main(["inspect", str(golden)]) == 2
    assert not capsys.readouterr().out


def test_whole_numbers_of_a_report_may_have_a_point(
    golden: Path, sign_again: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON knows no difference between 64 and 64.0, and some writers put the point."""
    path = golden / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    number = next(n for n, level in enumerate(report["levels"]) if level["level"] == "corpus")
    label, regime = next(iter(report["levels"][number]["data"]["regimes"].items()))
    place = ("levels", number, "data", "regimes", label, "tokens")
    path.write_text(json.dumps(changed(report, place, float(regime["tokens"]))), encoding="utf-8")
    sign_again(golden)
    assert main(["inspect", str(golden), "--full"]) == 0
    assert f" {regime['tokens']:,d} " in capsys.readouterr().out
