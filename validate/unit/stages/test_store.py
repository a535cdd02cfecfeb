"""The store of stages: what was kept comes back bit for bit, and nothing that goes wrong with it ends a build."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crt_export import catalog
from crt_export.folders import lock_folder, unlock_folder
from crt_export.stages import store as store_module
from crt_export.stages.store import StageStore, code_identity, default_folder, stage_key

FILES = {"graphs/a.onnx": b"graph", "graphs/a.weights": bytes(range(256)) * 20_000}
ANSWER = {"files": ["graphs/a.onnx"]}


def age_by(path: Path, seconds: float) -> None:
    """Make a file or folder older."""
    time = path.stat().st_mtime - seconds
    os.utime(path, (time, time))


class Place:
    """A store, what it said, and a bundle folder with the files."""

    def __init__(self, folder: Path, limit: int = 2**30) -> None:
        self.notes: list[str] = []
        self.folder, self.source = folder / "store", folder / "bundle"
        self.store = StageStore(folder=self.folder, note=self.notes.append, limit=limit)
        self._targets = 0
        for name, content in FILES.items():
            (self.source / name).parent.mkdir(parents=True, exist_ok=True)
            (self.source / name).write_bytes(content)

    def keep(self, key: str = "k") -> None:
        self.store.keep("graphs", key, self.source, FILES, ANSWER)

    def restore(self, key: str = "k") -> tuple[dict | None, dict[str, bytes]]:
        self._targets += 1
        target = self.source.with_name(f"target{self._targets}")
        answer = self.store.restore("graphs", key, target)
        files = [path for path in target.rglob("*") if path.is_file()]
        return answer, {path.relative_to(target).as_posix(): path.read_bytes() for path in files}

    @property
    def entry(self) -> Path:
        return self.folder / "graphs-k"


def sealed(entry: Path, **changes: object) -> None:
    """Change an entry.json and give it the digest that fits."""
    document = {**json.loads((entry / "entry.json").read_text()), **changes}
    document.pop("sha256")
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (entry / "entry.json").write_text(json.dumps({**document, "sha256": digest}))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_was_kept_comes_back(place: Place) -> None:
    assert place.restore() == (None, {})
    place.keep()
    assert place.restore() == (ANSWER, FILES)
    assert place.restore("other") == (None, {})
    assert place.notes == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "files/graphs/a.weights").write_bytes(FILES["graphs/a.weights"][:-1] + b"x"),
        lambda entry: (entry / "files/graphs/a.weights").write_bytes(b"short"),
        lambda entry: (entry / "files/graphs/a.onnx").unlink(),
        lambda entry: (entry / "entry.json").write_bytes(b"{"),
        lambda entry: (entry / "entry.json").write_bytes(b"\xff"),
        lambda entry: (entry / "entry.json").write_text("[]"),
        lambda entry: (entry / "entry.json").write_text('{"stage": "graphs", "key": "k"}'),
        lambda entry: (entry / "entry.json").write_text((entry / "entry.json").read_text().replace('"k"', '"l"')),
        lambda entry: (entry / "entry.json").write_text((entry / "entry.json").read_text().replace("a.onnx", "../x")),
        lambda entry: (entry / "entry.json").write_text((entry / "entry.json").read_text().replace("[", "[1, ")),
        lambda entry: (entry / "entry.json").unlink(),
        lambda entry: (
            (entry / "files/graphs/a.onnx").unlink(),
            (entry / "files/graphs/a.onnx").symlink_to("/dev/null"),
        ),
        lambda entry: (entry / "entry.json").write_bytes(b"[" * 100_000),
        lambda entry: ((entry / "entry.json").unlink(), os.mkfifo(entry / "entry.json")),
        lambda entry: ((entry / "entry.json").unlink(), (entry / "entry.json").mkdir()),
        lambda entry: ((entry / "entry.json").rename(entry / "x"), (entry / "entry.json").symlink_to("x")),
        lambda entry: ((entry / "entry.json").unlink(), (entry / "entry.json").symlink_to("/dev/zero")),
        lambda entry: os.truncate(entry / "entry.json", 2**40),
        lambda entry: (entry / "entry.json").write_text("9" * 10_000),
        lambda entry: os.truncate(entry / "files/graphs/a.weights", 2**40),
        lambda entry: ((entry / "files/graphs/a.onnx").unlink(), os.mkfifo(entry / "files/graphs/a.onnx")),
        lambda entry: (shutil.rmtree(entry), entry.write_bytes(b"")),
        lambda entry: (shutil.rmtree(entry), os.mkfifo(entry)),
        lambda entry: (entry.rename(entry.with_name("x")), entry.symlink_to("x")),
        lambda entry: sealed(entry, files={"graphs/a.onnx": 7}),
        lambda entry: sealed(entry, files=[]),
    ],
    ids=[
        "bit",
        "short",
        "missing",
        "json",
        "utf-8",
        "list",
        "no files",
        "other key",
        "outside",
        "answer",
        "no entry",
        "link",
        "deep",
        "pipe",
        "folder",
        "linked entry",
        "device",
        "huge",
        "digits",
        "huge file",
        "pipe for a file",
        "file for the entry",
        "pipe for the entry",
        "link for the entry",
        "type of a file",
        "type of the files",
    ],
)
def test_a_damaged_entry_is_noted_removed_and_made_again(place: Place, damage: Callable[[Path], object]) -> None:
    place.keep()
    damage(place.entry)
    assert place.restore() == (None, {})
    assert len(place.notes) == 1
    assert "damaged" in place.notes[0]
    assert not os.path.lexists(place.entry)
    place.keep()
    assert place.restore() == (ANSWER, FILES)
    assert not [path for path in place.folder.iterdir() if path.name.startswith(".")]


def test_an_answer_of_another_kind_is_damage_too(place: Place) -> None:
    place.keep()
    sealed(place.entry, answer={"other": 1})
    target = place.source.with_name("target")
    assert place.store.restore_as("graphs", "k", target, lambda answer: answer["graphs"]) is None
    assert [path for path in target.rglob("*") if path.is_file()] == []
    assert "holds another kind of answer" in place.notes[0]
    assert not place.entry.exists()


def test_a_full_disk_leaves_no_entry_and_ends_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(store_module.shutil, "copyfile", full)
        place.keep()
    assert "No space left" in place.notes[0]
    assert list(place.folder.iterdir()) == []
    place.keep()
    assert place.restore() == (ANSWER, FILES)


def test_a_folder_that_cannot_be_used_is_as_good_as_none(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.folder.write_text("a file")
    place.keep()
    assert place.restore() == (None, {})
    assert len(place.notes) == 1


def test_builds_side_by_side_keep_and_find_whole_entries(tmp_path: Path) -> None:
    places = [Place(tmp_path / str(index)) for index in range(4)]
    stores = [StageStore(folder=tmp_path / "shared", note=place.notes.append) for place in places]

    def work(index: int) -> list[bool]:
        found = []
        for turn in range(6):
            stores[index].keep("graphs", str(turn), places[index].source, FILES, ANSWER)
            target = tmp_path / f"out{index}-{turn}"
            found.append(stores[index].restore("graphs", str(turn), target) == ANSWER)
            assert (target / "graphs/a.weights").read_bytes() == FILES["graphs/a.weights"]
        return found

    with ThreadPoolExecutor(4) as pool:
        assert all(all(found) for found in pool.map(work, range(4)))
    assert [place.notes for place in places] == [[]] * 4
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == [f"graphs-{turn}" for turn in range(6)]


def test_beyond_the_limit_the_least_recently_used_go(tmp_path: Path) -> None:
    size = sum(map(len, FILES.values()))
    place = Place(tmp_path, limit=int(2.5 * size))
    for age, key in ((300, "a"), (200, "b")):
        place.keep(key)
        age_by(place.folder / f"graphs-{key}", age)
    assert place.restore("a")[0] == ANSWER
    place.keep("c")
    assert sorted(path.name for path in place.folder.iterdir()) == ["graphs-a", "graphs-c"]


def test_what_a_killed_build_left_goes_with_the_next_one(place: Place) -> None:
    place.keep("first")
    left, running = (place.folder / f".unfinished-{pid}-abcdefgh" for pid in (2**31 - 1, os.getpid()))
    for folder in (left, running):
        folder.mkdir()
    lock = lock_folder(running)
    place.keep()
    unlock_folder(lock)
    assert not left.exists()
    assert running.exists()


def test_key_depends_on_inputs_stage_sources_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    shutil.copytree(Path(store_module.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    known = {stage_key("graphs", {"a": 1}), stage_key("graphs", {"a": 2}), stage_key("engines", {"a": 1})}
    assert len(known) == 3

    def real(folder: Path) -> list[Path]:
        return [path for path in sorted(folder.rglob("*.py")) if "_catalog" not in path.parts]

    def changed() -> str:
        code_identity.cache_clear()
        return stage_key("graphs", {"a": 1})

    try:
        monkeypatch.setattr(catalog, "sources", lambda: real(package))
        assert changed() in known  # the same files elsewhere
        (package / "graph" / "export.py").write_text("# changed\n", encoding="utf-8")
        source = changed()
        monkeypatch.setattr(store_module, "installed_versions", lambda _: {"torch": "0"})
        version = changed()
    finally:
        code_identity.cache_clear()
    assert len({*known, source, version}) == 5


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "crt-export" / "stages"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "crt-export" / "stages"


def test_entry_lists_what_it_holds(place: Place) -> None:
    place.keep()
    document = json.loads((place.entry / "entry.json").read_text())
    assert document["files"]["graphs/a.onnx"]["size"] == len(FILES["graphs/a.onnx"])
