"""The documents say what the package does: commands parse, make targets, links, extras and names exist."""

from __future__ import annotations

import ast
import importlib
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
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "graphs/README.md",
    "engines/README.md",
    "validate/README.md",
    "docs/bundle.md",
    "docs/how-to/compare-with-your-model.md",
    "examples/README.md",
    "examples/02_embed_cpp/README.md",
    "examples/03_embed_c/README.md",
    "engines/cpp/README.md",
    "docs/privacy.md",
    "docs/signing.md",
    "docs/release.md",
)


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


def test_readme_shows_every_verb() -> None:
    assert {command[1] for command in commands("README.md") if command[0] == "crt-export"} == set(app.commands)


@pytest.mark.parametrize("target", [command[1] for command in ALL_COMMANDS if command[0] == "make"])
def test_documented_make_target_exists(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_installation_lines_name_real_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {extra for group in re.findall(r"crt-export\[([a-z,]+)\]", text) for extra in group.split(",")}
    assert named <= set(project["optional-dependencies"])
    for extra in project["optional-dependencies"]:
        assert re.search(rf"^\|.*`{extra}`", text, re.M), f"the table of extras lacks {extra}"


@pytest.mark.parametrize("code", blocks("README.md", "python"))
def test_python_block_compiles_and_imports_real_names(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_support_matrix_names_every_target() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [profile.name for profile in list_profiles() if f"`{profile.name}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (folder / link).exists()]
    assert broken == []
