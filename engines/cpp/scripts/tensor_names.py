"""Write engines/cpp/src/engine/tensor_names.hpp from graphs/*.toml: python engines/cpp/scripts/tensor_names.py.

The header is committed, so that building the library needs no Python; a test makes it again and compares.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from crt_export.models.declaration import HIDDEN, StateSpec

ROOT = Path(__file__).resolve().parents[3]
HEADER = ROOT / "engines" / "cpp" / "src" / "engine" / "tensor_names.hpp"
CACHE, STATE = "{i}", "{name}"

_TOP = """\
// Names of the graphs and of their tensors. Generated from graphs/*.toml by engines/cpp/scripts/tensor_names.py:
// change those files and run the script.
#pragma once

#include <cstddef>
#include <string>

namespace crt::names {

"""
_BOTTOM = """
}  // namespace crt::names
"""


def render(folder: Path) -> str:
    """The header's text for the definitions of a folder."""
    definitions = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.toml"))]
    if not definitions:
        raise FileNotFoundError(f"{folder}: expected the graph definitions *.toml, found none")
    graphs = [definition["name"] for definition in definitions]
    entries = [entry for definition in definitions for side in ("inputs", "outputs") for entry in definition[side]]
    names = list(dict.fromkeys(entry["name"] for entry in entries))
    lines = ["// --- graphs", *(_constant(f"graph_{name}", name) for name in graphs)]
    lines += ["", "// --- tensors", *(_constant(name, name) for name in names if "{" not in name)]
    lines += ["", "// --- tensors of one cache", *(_of_cache(name) for name in names if CACHE in name)]
    lines += ["", "// --- tensors of one state", *(_of_state(name) for name in names if STATE in name)]
    return _TOP + "\n".join(lines) + "\n" + _BOTTOM


def _constant(identifier: str, name: str) -> str:
    camel = "".join(part.capitalize() for part in identifier.split("_"))
    return f'inline constexpr char k{camel}[] = "{name}";'


def _of_cache(name: str) -> str:
    before, after = name.split(CACHE)
    identifier = f"{before}{after}".replace("..", ".").replace(".", "_")
    value = f'"{before}" + std::to_string(index) + "{after}"'
    return f"inline std::string {identifier}(std::size_t index) {{\n  return {value};\n}}"


def _of_state(name: str) -> str:
    before = name.removesuffix(STATE)
    hidden = StateSpec(name=HIDDEN, shape=(1,)).tensor(name)
    value = f'name == kHidden ? "{hidden}" : "{before}" + name'
    return f"inline std::string {before.rstrip('.')}(const std::string& name) {{\n  return {value};\n}}"


if __name__ == "__main__":
    HEADER.write_text(render(ROOT / "graphs"), encoding="utf-8")
