"""What a graph file may consist of: operators, opsets, and data that stays beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from crt_export.bundle.external_data import external_tensors
from crt_export.bundle.paths import file_problem, name_problem
from crt_export.engine.source_graph import source_graph_from_file
from crt_export.errors import BuildError, BundleError
from crt_export.graph.contract import OPERATORS
from crt_export.graph.export import OPSET
from crt_export.parity.case import ParityCase
from crt_export.quantize.w8 import DOMAIN

_DEFAULT_DOMAIN = "ai.onnx"
_CONTRIB_OPSET = 1
_WEIGHT_ONLY = "MatMulNBits"
_QUANTISING = frozenset({"QuantizeLinear", "DequantizeLinear"})
#: Operators of the default domain in every precision: the contract's own list less those that only quantisation brings.
_PLAIN = OPERATORS - _QUANTISING - {_WEIGHT_ONLY}
#: In the contract's list, but in no form that was ever made for TensorRT to compile: both rope layouts and forms of
#: attention, sliding window, tied head, plain transformer, FP16 and W8A8, one to three layers.
_NEVER_COMPILED = frozenset({"Equal", "Identity", "Max", "Neg"})


def allowed_operators(case: ParityCase) -> frozenset[str]:
    """Names as :func:`operator_name` gives them.

    The source of the list is :data:`crt_export.graph.contract.OPERATORS`, what every runtime was seen to parse and run.
    ``com.microsoft::MatMulNBits`` is ONNX Runtime's own and belongs to ``w8`` alone; QuantizeLinear and
    DequantizeLinear belong to ``w8a8``. A compiled target may hold only what was seen to compile.
    """
    allowed = _PLAIN if case.runtime == "onnxruntime" else _PLAIN - _NEVER_COMPILED
    if case.precision == "w8a8":
        allowed |= _QUANTISING
    if case.precision == "w8" and case.runtime == "onnxruntime":
        allowed |= {f"{DOMAIN}::{_WEIGHT_ONLY}"}
    return allowed


def allowed_opsets(case: ParityCase) -> dict[str, int]:
    """Version per domain: the exporter's opset, and ONNX Runtime's own operators for ``w8``."""
    own = {DOMAIN: _CONTRIB_OPSET} if case.precision == "w8" and case.runtime == "onnxruntime" else {}
    return {_DEFAULT_DOMAIN: OPSET, **own}


def operator_name(node: ir.Node) -> str:
    """``MatMul`` in the default domain, ``com.microsoft::MatMulNBits`` in another."""
    return node.op_type if node.domain in ("", _DEFAULT_DOMAIN) else f"{node.domain}::{node.op_type}"


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs, nested graphs included."""
    return dict(sorted(Counter(operator_name(node) for node in model.graph.all_nodes()).items()))


def opsets(model: ir.Model) -> dict[str, int]:
    """Version per domain that the file imports."""
    return {domain or _DEFAULT_DOMAIN: version for domain, version in model.opset_imports.items()}


def policy_problems(model: ir.Model, case: ParityCase, path: Path) -> Iterator[str]:
    """Foreign operators, wrong opsets, functions, and for a compiled target what TensorRT would compile wrongly."""
    allowed = allowed_operators(case)
    foreign = {name: count for name, count in operator_counts(model).items() if name not in allowed}
    for name, count in foreign.items():
        example = next(node for node in model.graph.all_nodes() if operator_name(node) == name)
        yield (
            f"operator {name} ({count} nodes, such as {example.name or '(unnamed)'}) is not allowed in a "
            f"{case.precision} graph for {case.runtime}; allowed are {', '.join(sorted(allowed))}"
        )
    expected, found = allowed_opsets(case), opsets(model)
    for domain in sorted(expected.keys() | found.keys()):
        # A graph without the domain's operators need not import it.
        if domain in expected and domain not in found and domain != _DEFAULT_DOMAIN:
            continue
        if expected.get(domain) != found.get(domain):
            yield f"opset of {domain}: expected {expected.get(domain, 'none')}, found {found.get(domain, 'none')}"
    for function in model.functions.values():
        yield f"function {function.domain}::{function.name} hides operators; graphs hold plain nodes only"
    if case.runtime != "onnxruntime":
        yield from _dialect_problems(path)


def external_files(path: Path) -> tuple[list[str], list[str]]:
    """Names of the files a graph's weights lie in, and what is wrong with them.

    A file must lie beside the graph, be regular and be reached through no link: nothing else is copied, hashed and
    listed with a bundle. Nothing is opened that is not.
    """
    try:
        tensors = external_tensors(path)
    except BundleError as error:
        return [], [str(error)]
    locations = {tensor.location: tensor.tensor for tensor in reversed(tensors)}
    problems = []
    for location, tensor in locations.items():
        problem = name_problem(location)
        if problem is None and "/" in location:
            problem = "lies in another folder than the graph"
        problem = problem or file_problem(path.parent, location)
        if problem:
            problems.append(f"tensor {tensor} points at {location!r:.200}, which {problem}")
    return sorted(locations), problems


def _dialect_problems(path: Path) -> Iterator[str]:
    try:
        source_graph_from_file(path)
    except BuildError as error:
        yield str(error)
