"""Every example program in Python runs as its README says and does what it claims."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from crt_export.runtime import GenerationOptions, generate_text, load_bundle

Run = Callable[..., "subprocess.CompletedProcess[str]"]
PYTHON_EXAMPLES = ("01_embed_python", "04_several_users", "05_resume_conversation")


@pytest.fixture
def example(root: Path, python: Run) -> Run:
    """``example(name, *arguments)``: run the program of an example folder in an empty folder."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (program,) = (root / "examples" / name).glob("*.py")
        result = python(str(program), *arguments)
        assert (result.returncode, result.stderr) == (0, "")
        return result

    return run


@pytest.mark.parametrize("name", PYTHON_EXAMPLES)
def test_readme_commands_name_the_program_and_its_arguments(root: Path, name: str) -> None:
    text = (root / "examples" / name / "README.md").read_text(encoding="utf-8")
    commands = [shlex.split(line[2:]) for line in re.findall(r"^\$ .*", text, re.M)]
    runs = [command for command in commands if command[0] != "make"]
    assert runs
    for interpreter, program, bundle, *rest in runs:
        assert interpreter == ".venv/bin/python"
        assert (root / program).is_file()
        assert (bundle, bool(rest)) == ("build/demo", True)


def test_embedding_takes_twenty_lines_and_streams(root: Path, example: Run, bundle: Path) -> None:
    lines = (root / "examples" / "01_embed_python" / "embed.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 20
    text = example("01_embed_python", str(bundle), "The for statement").stdout
    assert re.search(r"\n\[\d+ tokens, ended by (max_new_tokens|stop_string)\]\n$", text)


def test_embedding_needs_no_torch_and_no_onnx(root: Path, python: Run, bundle: Path) -> None:
    program = root / "examples" / "01_embed_python" / "embed.py"
    blocked = (
        "import runpy, sys; sys.modules.update(torch=None, onnx=None, onnxscript=None, onnx_ir=None); "
        f"sys.argv = ['embed.py', {str(bundle)!r}, 'a']; runpy.run_path({str(program)!r})"
    )
    result = python("-c", blocked)
    assert result.returncode == 0, result.stderr


def test_each_user_gets_what_the_prompt_gets_alone(example: Run, bundle: Path) -> None:
    prompts = ["The for statement", "A class", "x"]
    together = example("04_several_users", str(bundle), *prompts).stdout
    options = GenerationOptions(max_new_tokens=60, stop_strings=("\n",))
    with load_bundle(bundle) as opened:
        alone = ["".join([prompt, *generate_text(opened, prompt, options)]) for prompt in prompts]
    assert together == "".join(f"{text}\n" for text in alone)


def test_a_resumed_conversation_is_the_uninterrupted_one(example: Run, bundle: Path, tmp_path: Path) -> None:
    def talk(snapshot: str, *texts: str) -> list[str]:
        runs = [example("05_resume_conversation", str(bundle), str(tmp_path / snapshot), text) for text in texts]
        return [run.stdout.removesuffix("\n") for run in runs]

    first, second = talk("a.crt", "The for statement", " is also")
    again, *_ = talk("b.crt", "The for statement")
    assert first == again
    assert second
    assert talk("b.crt", " is also") == [second]


def test_a_file_that_is_no_snapshot_is_refused_and_kept(root: Path, python: Run, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "talk.crt").write_bytes(b"no snapshot")
    (program,) = (root / "examples" / "05_resume_conversation").glob("*.py")
    result = python(str(program), str(bundle), str(tmp_path / "talk.crt"), "text")
    assert result.returncode == 1
    assert "BundleError" in result.stderr
    assert (tmp_path / "talk.crt").read_bytes() == b"no snapshot"


@pytest.mark.parametrize("document", ["README.md", "docs/runtime.md"])
def test_python_of_a_document_runs(root: Path, python: Run, bundle: Path, tmp_path: Path, document: str) -> None:
    text = (root / document).read_text(encoding="utf-8")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "demo").symlink_to(bundle, target_is_directory=True)
    programs = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert programs
    for program in programs:
        result = python("-c", program)
        assert (result.returncode, result.stderr) == (0, "")
