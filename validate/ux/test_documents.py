"""The documents say what the package does: commands parse, make targets, links, extras and names exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import click
import pytest

from crt_export.cli import app
from crt_export.profile import list_profiles

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("graphs", "engines", "validate", "examples")
PATTERNS = (
    "*.md",
    "docs/**/*.md",
    *(f"{folder}/{rest}" for folder in FOLDERS for rest in ("README.md", "*/README.md")),
)
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern))


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)


def commands(document: str) -> list[list[str]]:
    lines = "\n".join(blocks(document, "console")).splitlines()
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]


ALL_COMMANDS = [command for document in DOCUMENTS for command in commands(document)]


@pytest.mark.parametrize(
    "arguments", [command[1:] for command in ALL_COMMANDS if command[0] == "crt-export"], ids=" ".join
)
def test_documented_command_line_parses(arguments: list[str]) -> None:
    verb = app.commands[arguments[0]]
    with verb.make_context(arguments[0], arguments[1:]) as context:
        assert isinstance(context, click.Context)


def test_readme_and_the_page_of_commands_show_every_verb() -> None:
    for document in ("README.md", "docs/commands.md"):
        shown = {
            command[1] for command in (*commands(document), *commands("docs/install.md")) if command[0] == "crt-export"
        }
        assert shown == set(app.commands), document


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_reachable_from_the_readme() -> None:
    reached, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page in reached or not page.is_file():
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
        waiting += [page.parent / link for link in links if link.endswith(".md") and "://" not in link]
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(str(page.relative_to(ROOT)) for page in pages - reached) == []


def test_results_are_what_was_measured() -> None:
    script = ROOT / "validate" / "results" / "pages.py"
    specification = importlib.util.spec_from_file_location("result_pages", script)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert {page.name for page in module.PAGES} >= {"README.md", "parity.md", "speed.md"}
    for page in module.PAGES:
        text = page.read_text(encoding="utf-8")
        assert module.written_anew(text) == text, f"{page.name}: run python validate/results/pages.py"


@pytest.mark.parametrize("target", [command[1] for command in ALL_COMMANDS if command[0] == "make"])
def test_documented_make_target_exists(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_installation_lines_name_real_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/install.md"))
    named = {extra for group in re.findall(r"crt-export\[([a-z,]+)\]", text) for extra in group.split(",")}
    assert named <= set(project["optional-dependencies"])
    for extra in project["optional-dependencies"]:
        assert re.search(rf"^\|.*`{extra}`", text, re.M), f"the table of extras lacks {extra}"


@pytest.mark.parametrize("code", [*blocks("README.md", "python"), *blocks("docs/runtime.md", "python")])
def test_python_block_compiles_and_imports_real_names(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_support_matrix_names_every_target() -> None:
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert [profile.name for profile in list_profiles() if f"`{profile.name}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (folder / link).exists()]
    assert broken == []


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.startswith("docs/")])
def test_files_of_the_package_that_a_page_names_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_]+/[\w/]+\.(?:py|hpp|cpp|h|toml|json))`", text)
    known = [ROOT, ROOT / "crt_export", ROOT / "validate"]
    examples = {
        "engines/cpu-two-threads.toml",
        "crt_export/models/my_model.py",
        "validate/unit/models/test_my_model.py",
    }
    assert [name for name in named if name not in examples and not any((base / name).exists() for base in known)] == []
