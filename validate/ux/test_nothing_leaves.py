"""SECURITY.md's promise: nothing is sent, nothing is left in the home folder, and forked children end.

ONNX Runtime's wheels from 1.29 on carry a telemetry that breaks all three where it is not switched off.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crt_export.engine.ort import import_onnxruntime

WITHOUT_NETWORK = Path(__file__).with_name("without_network.py")
UNSET = ("CI", "ORT_DISABLE_TELEMETRY", "MPLCONFIGDIR", "TF_BUILD", "GITHUB_ACTIONS")
Private = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="sockets are refused by a seccomp filter of Linux on x86_64 or aarch64",
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def private(home: Path, tmp_path: Path, environment: dict[str, str]) -> Private:
    """``private(*command, name=value...)``: run as a user who has just logged in; a network socket is death."""
    kept = {key: value for key, value in environment.items() if key not in UNSET and not key.startswith("XDG_")}

    def run(*command: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, WITHOUT_NETWORK, *command],
            cwd=tmp_path,
            env={**kept, "HOME": str(home), **changes},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=240,
            check=False,
        )

    return run


def files(home: Path) -> set[str]:
    return {path.relative_to(home).as_posix() for path in home.rglob("*") if not path.is_dir()}


CLI = (sys.executable, "-m", "crt_export")


def test_the_filter_ends_whoever_opens_a_socket(private: Private) -> None:
    assert private(sys.executable, "-c", "import socket; socket.socketpair()").returncode == 0
    for call in ("socket.socket()", "socket.getaddrinfo('localhost.invalid', 80)"):
        result = private(sys.executable, "-c", f"import socket; {call}")
        assert result.returncode == -signal.SIGSYS, result


def test_what_the_wheel_does_by_itself(private: Private, home: Path) -> None:
    """The control: where this fails, the wheel has changed, and the tests below show nothing."""
    version = tuple(map(int, import_onnxruntime().__version__.split(".")[:2]))
    private(sys.executable, "-c", "import onnxruntime, time; time.sleep(0.5)", ORT_DISABLE_TELEMETRY="0")
    assert bool(files(home)) == (version >= (1, 29))


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "{bundle}", "--prompt", "The", "--max-new-tokens", "3"),
        ("selftest", "{bundle}"),
        ("inspect", "{bundle}", "--verify"),
        ("report", "{bundle}", "--output", "page.html"),
        ("doctor",),
        ("targets",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_verbs_send_and_leave_nothing(private: Private, home: Path, bundle: Path, arguments: tuple[str, ...]) -> None:
    result = private(*CLI, *(argument.format(bundle=bundle) for argument in arguments))
    assert result.returncode == 0, result.stderr
    assert files(home) == set()
    assert not any(path.name == "Microsoft" for path in home.rglob("*"))


def test_an_empty_setting_is_none(private: Private, home: Path, bundle: Path) -> None:
    command = ("generate", str(bundle), "--prompt", "The", "--max-new-tokens", "1")
    assert private(*CLI, *command, ORT_DISABLE_TELEMETRY="").returncode == 0
    assert files(home) == set()


def test_benchmark_sends_and_leaves_nothing(private: Private, home: Path, bundle: Path) -> None:
    """Its candidates run in processes of their own."""
    few = ("--rounds", "3", "--steps", "3", "--prompt-tokens", "4", "--position", "4")
    result = private(*CLI, "bench", str(bundle), "--target", "ort-cpu-fp32", *few, "--html", "page.html")
    assert result.returncode == 0, result.stderr
    assert files(home) == set()


@pytest.mark.evidence  # tens of seconds
def test_build_leaves_its_stage_cache_and_nothing_else(
    private: Private, home: Path, make_checkpoint: Callable[..., Path]
) -> None:
    command = ("build", str(make_checkpoint()), "--output", "built", "--unvalidated", "--target", "ort-cpu-int8")
    result = private(*CLI, *command)
    assert result.returncode == 0, result.stderr
    assert {name for name in files(home) if not name.startswith(".cache/crt-export/stages/")} == set()
    assert files(home)


@pytest.mark.parametrize("program", ["crt-selftest", "examples/02_embed_cpp/embed_cpp", "examples/03_embed_c/embed_c"])
def test_native_programs_send_and_leave_nothing(
    private: Private, home: Path, bundle: Path, cpp_build: Path, program: str
) -> None:
    arguments = () if program == "crt-selftest" else ("The for statement",)
    result = private(cpp_build / program, bundle, *arguments)
    assert result.returncode == 0, result.stderr
    assert files(home) == set()


def test_the_applications_own_import_decides(private: Private) -> None:
    code = "import onnxruntime, os; from crt_export.engine.ort import import_onnxruntime as ours; ours(); "
    result = private(sys.executable, "-c", code + "print(os.environ.get('ORT_DISABLE_TELEMETRY'))")
    assert result.stdout == "None\n", result.stderr


FORK = """
import os, signal, sys, time
from crt_export.errors import UnsupportedError
from crt_export.runtime import load_bundle
threads, how = int(sys.argv[2]), sys.argv[3]
bundle = load_bundle(sys.argv[1])
session = bundle.session("ort-cpu-fp32", threads=threads)
session.prefill([[65, 66]])
time.sleep(0.3)  # until the threads of the session sleep
child = os.fork()
if child == 0:
    signal.alarm(20)  # a hang is a death
    if how == "close":
        session.close()
        bundle.close()
    elif how == "step":
        try:
            session.step([65])
        except UnsupportedError as error:
            sys.exit(5 if "before this process was forked" in str(error) else 6)
    sys.exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
session.step([65])
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("how", ["exit", "close", "step"])
def test_forked_child_ends(private: Private, bundle: Path, how: str, threads: int) -> None:
    result = private(sys.executable, "-W", "ignore", "-c", FORK, bundle, str(threads), how)
    expected = 5 if how == "step" and threads == 2 else 0
    assert (result.returncode, result.stdout) == (0, f"{expected}\n"), result.stderr


FORK_FROM_BUSY = """
import os, signal, sys, threading
from crt_export.runtime import load_bundle
bundle = load_bundle(sys.argv[1])
session, stopping = bundle.session("ort-cpu-fp32", threads=1), threading.Event()
def work():
    while not stopping.is_set():
        session.prefill([[65] * 40], passes="exact")
        session.reset()
worker = threading.Thread(target=work)
worker.start()
for how in [session, bundle] * 4:
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a hang is a death
        how.close()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end="")
stopping.set()
worker.join()
"""


def test_child_forked_while_another_thread_runs_a_session_closes_it(private: Private, bundle: Path) -> None:
    result = private(sys.executable, "-W", "ignore", "-c", FORK_FROM_BUSY, bundle)
    assert (result.returncode, result.stdout) == (0, "00000000"), result.stderr


def test_an_interrupt_while_onnxruntime_is_loaded_is_no_missing_package(private: Private, tmp_path: Path) -> None:
    """C code that meets an exception says "initialization failed"."""
    (tmp_path / "onnxruntime.py").write_text('raise ImportError("initialization failed") from KeyboardInterrupt()\n')
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "from crt_export.engine.ort import import_onnxruntime\n"
    code += "try: import_onnxruntime()\nexcept KeyboardInterrupt: print('interrupted')"
    result = private(sys.executable, "-c", code)
    assert result.stdout == "interrupted\n", result.stderr


def test_every_import_of_onnxruntime_is_the_one(root: Path) -> None:
    found = [
        f"{path.relative_to(root)}:{number}"
        for folder in ("crt_export", "validate", "examples", "engines")
        for path in (root / folder).rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip().startswith(("import onnxruntime", "from onnxruntime"))
    ]
    assert found == []
    assert os.environ.get("ORT_DISABLE_TELEMETRY")  # import_onnxruntime() ran in this process, too
