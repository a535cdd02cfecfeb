"""Where a bundle may be written, what commit refuses, and that refusing changes nothing."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from crt_export.bundle import check_output, open_bundle, stage_bundle
from crt_export.errors import BundleError

Manifest = dict[str, Any]
Build = Callable[..., Path]


def everything(folder: Path) -> dict[str, bytes | str]:
    """All names below a folder with content, link target or kind."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def refuse(output: Path, message: str, around: Path) -> None:
    before = everything(around)
    with pytest.raises(BundleError, match=message):
        check_output(output)
    with pytest.raises(BundleError, match=message), stage_bundle(output):
        pytest.fail("work was started")
    assert everything(around) == before


def test_output_that_is_absent_empty_or_a_bundle_is_taken(tmp_path: Path, build: Build) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent", "missing/parents/demo"):
        build(tmp_path / name)
        build(tmp_path / name, content="second")
        opened = open_bundle(tmp_path / name)
        opened.verify_all()
        assert opened.file("report.md").read_text("utf-8") == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["absent", "empty", "missing"]


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine", "utf-8")
    refuse(tmp_path / "demo", "is a file; expected a folder", tmp_path)
    refuse(tmp_path / "demo" / "below", "not a folder|Not a directory", tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_an_output_that_is_a_link_stays_one_and_a_pipe_is_refused(tmp_path: Path, build: Build) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "demo").symlink_to("disk/demo")
    for content in ("first", "second"):
        build(tmp_path / "demo", content=content)
        assert (tmp_path / "demo").is_symlink()
        assert open_bundle(tmp_path / "disk" / "demo").file("report.md").read_text("utf-8") == content
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["demo"]
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "is a pipe; expected a folder", tmp_path)
    (tmp_path / "to_pipe").symlink_to("pipe")
    refuse(tmp_path / "to_pipe", "is a pipe; expected a folder", tmp_path)


def test_output_that_is_somebody_elses_folder(tmp_path: Path) -> None:
    (tmp_path / "demo" / "photos").mkdir(parents=True)
    refuse(tmp_path / "demo", r"holding photos.* cannot be replaced.* has no manifest\.json", tmp_path)
    (tmp_path / "demo" / "manifest.json").write_text('{"name": "a web app"}', "utf-8")
    refuse(tmp_path / "demo", "cannot be replaced.*expected an integer 'schema_version'", tmp_path)


def test_output_that_is_a_bundle_of_a_newer_schema(
    tmp_path: Path, build: Build, edit_manifest: Callable[..., None]
) -> None:
    edit_manifest(build(tmp_path / "demo"), lambda manifest: manifest.update(schema_version=2))
    refuse(tmp_path / "demo", "upgrade crt-export", tmp_path)


def test_files_that_somebody_put_into_a_bundle_are_not_deleted(tmp_path: Path, build: Build) -> None:
    bundle = build(tmp_path / "demo")
    (bundle / "notes.txt").write_text("mine", "utf-8")
    (bundle / "graphs" / "link").symlink_to("/")
    refuse(bundle, r"2 problems\n.*'notes\.txt' was not written by the build\n.*'graphs/link' is a link", tmp_path)


def test_a_damaged_bundle_may_be_built_again(tmp_path: Path, build: Build) -> None:
    bundle = build(tmp_path / "demo")
    (bundle / "report.md").unlink()
    (bundle / "engines" / "step.plan").write_bytes(b"tampered")
    build(bundle)
    open_bundle(bundle).verify_all()


def test_output_that_is_the_current_folder_or_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "demo" / "inside")
    for output in (Path(), Path(".."), Path("/")):
        refuse(output, "is the current folder or one around it", tmp_path)


def test_names_that_cannot_be_an_output(tmp_path: Path) -> None:
    refuse(tmp_path / ".demo.partial-12", "gives to unfinished builds", tmp_path)
    for name in ("", "a\0b"):
        with pytest.raises(BundleError, match="must be the name of a folder"):
            check_output(name)
    refuse(tmp_path / ("x" * 300), "too long", tmp_path)


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(BundleError, match="is a mount point"):
        check_output("/proc")


NOT_WRITABLE = """
# Root may write anywhere; without its capabilities it is bound by permissions like everybody else.
if os.getuid() == 0:
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0
folder.chmod(0o555)
try:
    build("new")
except BundleError as error:
    print(error)
"""


@pytest.mark.parametrize("read_only", ["parent", "bundle"])
def test_output_that_is_not_writable(
    read_only: str, tmp_path: Path, build: Build, run_script: Callable[..., str]
) -> None:
    bundle = build(tmp_path / "demo")
    before = everything(tmp_path)
    script = NOT_WRITABLE if read_only == "parent" else NOT_WRITABLE.replace("folder.chmod", "output.chmod")
    try:
        message = run_script(script)
    finally:
        tmp_path.chmod(0o755)
        bundle.chmod(0o755)
    assert "is not writable" in message
    assert everything(tmp_path) == before


# ---------------------------------------------------------------- leaving the block


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, GeneratorExit])
@pytest.mark.parametrize("existing", [True, False])
def test_leaving_by_an_error_keeps_the_old_output(
    error: type[BaseException],
    existing: bool,
    tmp_path: Path,
    build: Build,
    write_files: Callable[..., None],
) -> None:
    output = tmp_path / "parents" / "demo"
    if existing:
        build(output)
    before = everything(tmp_path)

    def interrupted_build() -> None:
        with stage_bundle(output) as staging:
            write_files(staging.path, "new")
            assert staging.path.name == f".demo.partial-{os.getpid()}"
            raise error

    with pytest.raises(error):
        interrupted_build()
    assert everything(tmp_path) == before


def test_leaving_without_commit_keeps_the_old_output(tmp_path: Path, build: Build) -> None:
    build(tmp_path / "demo")
    before = everything(tmp_path)
    with stage_bundle(tmp_path / "demo") as staging:
        (staging.path / "file").write_bytes(b"")
        assert not staging.committed
    assert everything(tmp_path) == before


def test_an_error_after_commit_keeps_the_new_output(
    tmp_path: Path, build: Build, manifest: Manifest, write_files: Callable[..., None]
) -> None:
    output = build(tmp_path / "demo")

    def late_interrupt() -> None:
        with stage_bundle(output) as staging:
            write_files(staging.path, "new")
            staging.commit(manifest)
            assert staging.committed
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        late_interrupt()
    assert open_bundle(output).file("report.md").read_text("utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_what_a_writer_hashed_is_not_hashed_again_before_it_is_opened(
    tmp_path: Path, manifest: Manifest, write_files: Callable[..., None]
) -> None:
    with stage_bundle(tmp_path / "demo") as staging:
        write_files(staging.path, "first")
        right, wrong = hashlib.sha256(b"first").hexdigest(), "0" * 64
        staging.digests.update({"report.md": wrong})
        with closing(staging.complete(manifest)) as files:
            assert files.manifest["files"]["report.md"] == {"size": 5, "sha256": wrong}
            with pytest.raises(BundleError, match=f"has SHA-256 {right}, the manifest says {wrong}"):
                files.file("report.md")
        (staging.path / "report.md").write_text("changed since", "utf-8")
        staging.commit(manifest)
    assert open_bundle(tmp_path / "demo").file("report.md").read_text("utf-8") == "changed since"


# ---------------------------------------------------------------- what commit refuses


def add_link(folder: Path) -> None:
    (folder / "link").symlink_to("report.md")


def add_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def add_backslash(folder: Path) -> None:
    (folder / "a\\b").write_bytes(b"")


def add_bytes(folder: Path) -> None:
    (folder / os.fsdecode(b"\xff")).write_bytes(b"")


def add_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"{}")


def drop_weights(folder: Path) -> None:
    (folder / "graphs" / "fp32.weights").unlink()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (add_link, "'link' is a link"),
        (add_pipe, "'pipe' is not a regular file"),
        (add_backslash, "use '/' between folders"),
        (add_bytes, "only those of ASCII"),
        (add_manifest, "written by commit and by nobody else"),
        (drop_weights, "'graphs/fp32.weights', which is not listed in 'files'"),
    ],
)
def test_commit_refuses_what_a_loader_would_refuse(
    act: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    build: Build,
    manifest: Manifest,
    write_files: Callable[..., None],
) -> None:
    output = build(tmp_path / "demo")
    before = everything(tmp_path)

    def build_with_flaw() -> None:
        with stage_bundle(output) as staging:
            write_files(staging.path, "new")
            act(staging.path)
            staging.commit(manifest)

    with pytest.raises(BundleError, match=message):
        build_with_flaw()
    assert everything(tmp_path) == before


def test_commit_names_every_number_that_json_lacks(tmp_path: Path, build: Build) -> None:
    rows = [{"nll": 1.0}, {"nll": float("nan")}, {"nll": float("inf")}]
    with pytest.raises(BundleError, match=r"parity\.rows\[1\]\.nll is nan; write null.*\n.*rows\[2\]\.nll is inf"):
        build(tmp_path / "demo", parity={"passed": True, "rows": rows})
    assert list(tmp_path.iterdir()) == []


def test_commit_twice(tmp_path: Path, manifest: Manifest, write_files: Callable[..., None]) -> None:
    with stage_bundle(tmp_path / "demo") as staging:
        write_files(staging.path)
        staging.commit(manifest)
        with pytest.raises(BundleError, match="committed already"):
            staging.commit(manifest)
    open_bundle(tmp_path / "demo").verify_all()


def test_output_that_became_something_else_during_the_build(
    tmp_path: Path, manifest: Manifest, write_files: Callable[..., None]
) -> None:
    output = tmp_path / "demo"

    def disturbed_build() -> None:
        with stage_bundle(output) as staging:
            write_files(staging.path)
            output.mkdir()
            (output / "thesis.txt").write_text("mine", "utf-8")
            staging.commit(manifest)

    with pytest.raises(BundleError, match="cannot be replaced"):
        disturbed_build()
    assert everything(tmp_path) == {"demo": "folder", "demo/thesis.txt": b"mine"}


def test_output_behind_a_link_is_replaced_where_it_lies(tmp_path: Path, build: Build) -> None:
    build(tmp_path / "disk" / "demo")
    (tmp_path / "demo").symlink_to(tmp_path / "disk" / "demo")
    build(tmp_path / "demo", content="second")
    assert (tmp_path / "demo").is_symlink()
    assert open_bundle(tmp_path / "disk" / "demo").file("report.md").read_text("utf-8") == "second"


def test_read_only_folders_inside_the_old_bundle_do_not_stay_behind(tmp_path: Path, build: Build) -> None:
    output = build(tmp_path / "demo")
    (output / "graphs").chmod(0o555)
    build(output, content="second")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


# ---------------------------------------------------------------- a full disk

FULL = """
before = {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()}
try:
    with stage_bundle(output) as staging:
        write(staging.path, "new")
        for number in range(100):
            (staging.path / f"weights-{number}").write_bytes(bytes(65536))
        staging.commit(manifest)
except BundleError as error:
    print(error)
assert {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
assert os.listdir(folder) == ["demo"], os.listdir(folder)
open_bundle(output).file("report.md")
"""


def test_running_out_of_disk_keeps_the_old_output(run_script: Callable[..., str]) -> None:
    wrapper = ("unshare", "--user", "--map-root-user", "--mount")
    try:
        possible = subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("this system does not let a test mount a file system of its own")
    mount = """
    import subprocess
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], check=True)
    build("old")
    """
    message = run_script("\n".join(line.strip() for line in mount.splitlines()) + FULL, wrapper)
    assert "no room to write the bundle" in message
    assert "No space left on device" in message
    assert "is as it was" in message


def test_a_limit_on_the_size_of_files_keeps_the_old_output(run_script: Callable[..., str]) -> None:
    limit = """
import resource
build("old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
"""
    message = run_script(limit + FULL)
    assert "no room to write the bundle" in message
    assert "File too large" in message
