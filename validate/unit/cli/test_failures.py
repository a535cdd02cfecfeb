from __future__ import annotations

import errno

import click
import pytest

from crt_export.cli.app import run_app
from crt_export.errors import CheckpointError, MissingDependencyError, ParityError


def outcome(
    error: BaseException, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...] = ("go",)
) -> tuple[int, str]:
    """Exit code and stderr of a command that raises ``error`` after it wrote something to stdout."""

    @click.group()
    @click.option("--debug", is_flag=True)
    def app(debug: bool) -> None: ...

    @app.command()
    def go() -> None:
        raise error

    code = run_app(app, arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("config.json is missing"), 2),
        (ParityError("step differs"), 1),
        (MissingDependencyError("torch is missing"), 3),
        (click.UsageError("no such thing"), 2),
    ],
)
def test_deliberate_errors_are_one_message_and_their_own_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found, message = outcome(error, capsys)
    assert found == code
    assert "Traceback" not in message
    assert (error.message if isinstance(error, click.ClickException) else str(error)) in message


def test_missing_optional_package_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = outcome(ModuleNotFoundError("No module named 'torch'", name="torch"), capsys)
    assert code == 3
    assert "pip install 'crt-export[export]'" in message


def test_package_that_cannot_be_loaded_is_the_environments_fault(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = outcome(ImportError("libcudart.so.13: cannot open shared object file"), capsys)
    assert code == 3
    assert "libcudart" in message


def test_full_disk_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = outcome(OSError(errno.ENOSPC, "No space left on device"), capsys)
    assert (code, "No space left" in message) == (3, True)


def test_interruption_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(KeyboardInterrupt(), capsys) == (130, "interrupted\n")


def test_unexpected_error_is_70_and_hides_the_traceback_until_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, message = outcome(RuntimeError("boom"), capsys)
    assert code == 70
    assert "unexpected RuntimeError: boom" in message
    assert "Traceback" not in message
    code, message = outcome(RuntimeError("boom"), capsys, ("--debug", "go"))
    assert code == 70
    assert "Traceback" in message


def test_own_missing_module_is_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = outcome(ModuleNotFoundError("No module named 'crt_export.absent'", name="crt_export.absent"), capsys)
    assert code == 70


def test_a_broken_module_of_the_package_is_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    error = ImportError("cannot import name 'x' from 'crt_export.parity'", name="crt_export.parity")
    code, message = outcome(error, capsys)
    assert code == 70
    assert "bug in crt-export" in message
