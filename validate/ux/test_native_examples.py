"""The C++ and the C example, which make cpp builds against the installed package, print what the Python one prints."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PROMPT = "The for statement"
EXAMPLES = {"02_embed_cpp": "embed_cpp", "03_embed_c": "embed_c"}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(params=EXAMPLES)
def program(request: pytest.FixtureRequest, cpp_build: Path) -> Run:
    """``program(*arguments)``: run the example."""
    path = cpp_build / "examples" / request.param / EXAMPLES[request.param]
    return lambda *arguments: subprocess.run(
        [path, *arguments], capture_output=True, encoding="utf-8", timeout=120, check=False
    )


def test_example_streams_the_text_of_the_python_example(program: Run, python: Run, root: Path, bundle: Path) -> None:
    expected = python(str(root / "examples" / "01_embed_python" / "embed.py"), str(bundle), PROMPT)
    assert (expected.returncode, expected.stderr) == (0, "")
    result = program(str(bundle), PROMPT)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == expected.stdout
    assert re.search(r"\n\[\d+ tokens, ended by \w+\]\n$", result.stdout)


def test_example_says_what_is_wrong(program: Run, tmp_path: Path) -> None:
    result = program(str(tmp_path / "nothing"), PROMPT)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"error: no such bundle folder: {tmp_path / 'nothing'}\n"
    assert program().returncode == 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_readme_names_the_program_that_make_cpp_builds(root: Path, cpp_build: Path, name: str) -> None:
    text = (root / "examples" / name / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\$ (build/cpp/\S+) build/demo ", text, re.M)
    assert command == f"build/cpp/examples/{name}/{EXAMPLES[name]}"
    assert (cpp_build / "examples" / name / EXAMPLES[name]).is_file()
