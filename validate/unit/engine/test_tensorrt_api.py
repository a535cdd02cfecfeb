"""Every attribute and argument that our TensorRT code uses exists in the genuine bindings of each supported version.

What is used is read from the source itself, so the two cannot drift: each runtime object is annotated with its class
there, and an object without annotation fails the test. The bindings are NVIDIA's own compiled modules; the libraries
they link to are replaced by an empty one that a C compiler makes here, because only names and signatures are asked.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crt_export.engine.tensorrt import api, builder

SOURCES = (builder, api)
BINDINGS = Path(__file__).resolve().parents[3] / "build" / "bindings"
VERSIONS = ("10.16", "11.4")
CLASSES = {name for name, value in vars(api).items() if value is Any and name != "Any"}

# The symbols that the bindings link to. NULL for every object: the same as a machine whose driver does not start.
STUB = """
#define NOTHING(name) void* name(void) { return 0; }
NOTHING(createInferBuilder_INTERNAL) NOTHING(createInferRefitter_INTERNAL) NOTHING(createInferRuntime_INTERNAL)
NOTHING(createNvOnnxParser_INTERNAL) NOTHING(createNvOnnxParserRefitter_INTERNAL)
NOTHING(getBuilderPluginRegistry) NOTHING(getPluginRegistry)
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void* logger, char const* name) { return 1; }
"""

# Runs beside the bindings: says for each path of names what it is, and for a function its signatures.
DESCRIBE = """
import importlib, json, sys
api = importlib.import_module(sys.argv[1])
answers = {"__version__": {"kind": "value", "text": api.__version__}}
for path in json.loads(sys.argv[2]):
    found = api
    try:
        for name in path.split("."):
            found = getattr(found, name)
    except AttributeError:
        continue
    if isinstance(found, property):
        answers[path] = {"kind": "property", "writable": found.fset is not None}
    elif isinstance(found, type):
        answers[path] = {"kind": "callable", "text": found.__init__.__doc__ or ""}
    else:
        answers[path] = {"kind": "callable" if callable(found) else "value", "text": found.__doc__ or ""}
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Use:
    """One use of the API: a dotted path, how it is used, and in which function."""

    path: str
    kind: str  # "call", "write" or "read"
    arguments: int
    keywords: tuple[str, ...]
    function: str

    def belongs_to(self, module: str) -> bool:
        other = "_rtx" if module == "tensorrt" else "_tensorrt"
        return not self.function.endswith(other)


def annotated_class(node: ast.expr | None) -> str | None:
    """The API class of an annotation, ``X`` or ``X | None``."""
    if isinstance(node, ast.BinOp):
        return annotated_class(node.left)
    return node.id if isinstance(node, ast.Name) and node.id in CLASSES else None


def used_api(tree: ast.Module) -> tuple[list[Use], list[str]]:
    """All uses in a module, and the places where it cannot be told which class an object has."""
    uses: list[Use] = []
    unclear: list[str] = []
    returning = {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and annotated_class(f.returns)}
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            types = declared_types(function)
            unclear += [f"{function.name}: {text}" for text in untyped_objects(function, types, returning)]
            uses += uses_in(function, types)
    return uses, unclear


def declared_types(function: ast.FunctionDef) -> dict[str, str]:
    declared = [(argument.arg, argument.annotation) for argument in function.args.args]
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            declared.append((node.target.id, node.annotation))
    return {name: found for name, note in declared if (found := annotated_class(note)) is not None}


def untyped_objects(function: ast.FunctionDef, types: dict[str, str], returning: set[str]) -> Iterator[str]:
    """Objects that come from the API, or from a function that returns one, and are used without an annotation."""

    def from_api(value: ast.expr) -> bool:
        if not isinstance(value, ast.Call):
            return False
        if isinstance(value.func, ast.Name):
            return value.func.id in returning
        return root(value.func) in types

    assigned = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and from_api(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id in assigned - types.keys():
                yield f"{node.value.id}.{node.attr}"
            if isinstance(node.value, ast.Call) and root(node.value.func) in types and not dunder(node):
                yield ast.unparse(node)


def dunder(node: ast.Attribute) -> bool:
    return node.attr.startswith("__")


def root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def uses_in(function: ast.FunctionDef, types: dict[str, str]) -> Iterator[Use]:
    calls = {id(node.func): node for node in ast.walk(function) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    for node in ast.walk(function):
        if not isinstance(node, ast.Attribute) or id(node) in inner or root(node) not in types:
            continue
        start, *rest = ast.unparse(node).split(".")
        names = list(itertools.takewhile(lambda name: not name.startswith("__"), rest))
        if not names:
            continue  # api.__version__
        # What a property returns has a class of its own, such as tensor.shape or layer.type: only its name is checked.
        path = ".".join(names if types[start] == "Api" else [types[start], names[0]])
        call = calls.get(id(node))
        if isinstance(node.ctx, ast.Store):
            yield Use(path, "write", 0, (), function.name)
        elif call is not None and len(names) == len(rest):
            keywords = tuple(k.arg or "**" for k in call.keywords)
            yield Use(path, "call", len(call.args), keywords, function.name)
        else:
            yield Use(path, "read", 0, (), function.name)


def all_uses() -> tuple[list[Use], list[str]]:
    uses, unclear = [], []
    for module in SOURCES:
        found, questions = used_api(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")))
        uses += found
        unclear += questions
    return uses, unclear


def problems_of(use: Use, answers: dict[str, dict[str, Any]]) -> Iterator[str]:
    where = f"{use.path} ({use.kind} in {use.function})"
    found = answers.get(use.path)
    if found is None:
        yield f"{where} does not exist"
    elif use.kind == "write" and not found.get("writable"):
        yield f"{where} is not a writable property"
    elif use.kind == "call":
        if found["kind"] != "callable":
            yield f"{where} is no function"
        elif not any(fits(use, parameters) for parameters in signatures(found["text"])):
            yield f"{where} takes {found['text'].splitlines()[:3]}, not {use.arguments} arguments and {use.keywords}"


def signatures(text: str) -> list[list[tuple[str, bool]]]:
    """Parameters (name, has a default) of every overload in a pybind11 docstring, without ``self``."""
    overloads = re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> ", text, flags=re.MULTILINE)
    found = []
    for overload in overloads:
        if "*args" in overload:
            continue  # the heading of a list of overloads
        parts = split_parameters(overload)
        found.append([(part.split(":")[0].strip(), "=" in part) for part in parts if not part.startswith("self")])
    return found


def split_parameters(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def fits(use: Use, parameters: list[tuple[str, bool]]) -> bool:
    names = [name for name, _ in parameters]
    rest = parameters[use.arguments :]
    return (
        use.arguments <= len(parameters)
        and set(use.keywords) <= set(names[use.arguments :])
        and all(optional or name in use.keywords for name, optional in rest)
    )


def installed(version: str) -> Path:
    """The folder of genuine bindings of a version; skips, or fails where they are required."""
    found = sorted(BINDINGS.glob(f"{version}.*/tensorrt_bindings"))
    reason = f"TensorRT bindings {version} are not in {BINDINGS}: run make bindings"
    if shutil.which("gcc") is None:
        found, reason = [], "no C compiler (gcc) for the stub library"
    if not found and os.environ.get("CRT_EXPORT_REQUIRE_BINDINGS") == "1":
        pytest.fail(reason)
    if not found:
        pytest.skip(reason)
    return found[0].parent


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an empty library under every name that the bindings link to, and a package ``tensorrt``."""
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.c").write_text(STUB)
    for major in ("10", "11"):
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            target = folder / f"lib{library}.so.{major}"
            subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(target), str(folder / "stub.c")], check=True)
    (folder / "tensorrt").mkdir()
    shim = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    (folder / "tensorrt" / "__init__.py").write_text(shim)
    return folder


def run_python(code: str, *arguments: str, folders: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with packages and libraries from the given folders first."""
    paths = os.pathsep.join(map(str, folders))
    environment = {**os.environ, "PYTHONPATH": paths, "LD_LIBRARY_PATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def describe(module: str, paths: list[str], *folders: Path) -> dict[str, dict[str, Any]]:
    result = run_python(DESCRIBE, module, json.dumps(paths), folders=folders)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_source_says_of_every_api_object_which_class_it_has() -> None:
    uses, unclear = all_uses()
    assert not unclear
    assert len({use.path for use in uses}) > 40, "the source uses far more of the API: the walk has missed it"
    assert Use("Builder.build_serialized_network", "call", 2, (), "compile_graph") in uses
    assert Use("IBuilderConfig.num_compute_capabilities", "write", 0, (), "_configure_rtx") in uses
    assert Use("IExecutionContext.execute_async_v3", "call", 1, (), "enqueue") in uses
    assert Use("IRuntimeConfig.create_runtime_cache", "call", 0, (), "runtime_cache_rtx") in uses


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_has_everything_the_code_uses(version: str, stub: Path) -> None:
    uses = [use for use in all_uses()[0] if use.belongs_to("tensorrt")]
    answers = describe("tensorrt", [use.path for use in uses], stub, installed(version))
    assert answers["__version__"]["text"].startswith(version)
    assert "\n".join(problem for use in uses for problem in problems_of(use, answers)) == ""


def test_tensorrt_rtx_has_everything_the_code_uses() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (Linux x86_64 only)")
    uses = [use for use in all_uses()[0] if use.belongs_to("tensorrt-rtx")]
    answers = describe("tensorrt_rtx", [use.path for use in uses])
    assert "\n".join(problem for use in uses for problem in problems_of(use, answers)) == ""


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def f(builder: Builder): builder.build_engine(1, 2)", "does not exist"),
        ("def f(builder: Builder): builder.build_serialized_network(1)", "not 1 arguments"),
        ("def f(builder: Builder): builder.build_serialized_network(1, network=2)", "('network',)"),
        ("def f(config: IBuilderConfig): config.max_workspace_size = 1", "does not exist"),
        ("def f(network: INetworkDefinition): network.num_inputs = 1", "not a writable property"),
        ("def f(api: Api): api.BuilderFlag.FP16", "does not exist"),
        ("def f(api: Api): api.HardwareCompatibilityLevel.AMPERE_PLUS(1)", "is no function"),
    ],
)
def test_a_wrong_use_of_the_api_is_noticed(source: str, complaint: str, stub: Path) -> None:
    uses, unclear = used_api(ast.parse(source))
    answers = describe("tensorrt", [use.path for use in uses], stub, installed("11.4"))
    problems = [problem for use in uses for problem in problems_of(use, answers)]
    assert not unclear
    assert len(problems) == 1
    assert complaint in problems[0]


@pytest.mark.parametrize(
    "source",
    [
        "def f(builder: Builder):\n    config = builder.create_builder_config()\n    config.anything = 1",
        "def f(builder: Builder): builder.create_builder_config().anything()",
        "def g() -> Builder: ...\ndef f():\n    b = g()\n    b.anything()",
    ],
)
def test_an_object_without_annotation_is_noticed(source: str) -> None:
    assert used_api(ast.parse(source))[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_runtime_call_of_tensorrt_rtx_would_be_missed_in_tensorrt(version: str, stub: Path) -> None:
    """The check tells the two apart: what only TensorRT-RTX has is not there in TensorRT."""
    uses = [use for use in all_uses()[0] if use.function == "runtime_cache_rtx"]
    answers = describe("tensorrt", [use.path for use in uses], stub, installed(version))
    problems = [problem for use in uses for problem in problems_of(use, answers)]
    assert any("IRuntimeConfig.create_runtime_cache" in problem for problem in problems)


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_that_does_not_start_is_a_missing_dependency(version: str, stub: Path) -> None:
    code = """
import sys
from pathlib import Path
from crt_export import errors, machine
from crt_export.engine.tensorrt import api, builder
from crt_export.profile import load_profile
from crt_export.spec import GraphSpec
api.list_gpus = lambda: (machine.Gpu(name="GPU", compute_capability=90),)
contract = GraphSpec(name="step", inputs=(), outputs=(), aliases=())
job = builder.BuildJob(
    path=Path("step.onnx"), label="x", profile=load_profile("trt-sm80-fp16"), contract=contract, shapes={}
)
try:
    builder.compile_graph(job)
except errors.MissingDependencyError as error:
    sys.exit(f"{error.exit_code} {error}")
"""
    package = Path(str(builder.__file__)).parents[2]
    result = run_python(code, folders=(stub, installed(version), package))
    assert result.stderr.startswith("3 target trt-sm80-fp16 needs tensorrt 10.16 or newer")
    assert "its builder does not start" in result.stderr
