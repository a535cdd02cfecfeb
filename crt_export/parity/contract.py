"""Level L0: are the files what was agreed?

Nothing is run. Every graph of the target is held against the contract of ``graphs/*.toml``, against a list of operators
and opsets, and against the checkpoint, weight by weight; see :mod:`crt_export.parity.graph_audit` and
:mod:`crt_export.parity.weight_audit`.

``data`` of the result::

    graphs: per graph name
        file            name of the ONNX file
        bytes           its size, weights not counted
        opset           version per operator domain
        operators       how many nodes of each operator; other domains than ONNX's own as ``domain::operator``
        inputs, outputs how many
        external_files  names of the files its weights lie in
        weights_checked initializers that were compared with the checkpoint
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from crt_export.bundle.external_data import external_tensors
from crt_export.bundle.paths import file_problem, name_problem
from crt_export.engine.tensorrt.build import source_graph_from_file
from crt_export.errors import BuildError, BundleError
from crt_export.graph.contract import OPERATORS, interface_of
from crt_export.graph.export import OPSET
from crt_export.parity.graph_audit import attribute_problems, cache_problems, flow_problems, linear_problems
from crt_export.parity.levels import CONTRACT
from crt_export.parity.metrics import Check, claim, failed_check, measured
from crt_export.parity.report import LevelResult
from crt_export.parity.setup import ParityCase, ParitySetup
from crt_export.parity.weight_audit import WeightAudit
from crt_export.quantize.w8 import DOMAIN
from crt_export.spec import graph_names, interface_problems

_DEFAULT_DOMAIN = "ai.onnx"
_CONTRIB_OPSET = 1
_WEIGHT_ONLY = "MatMulNBits"
_QUANTISING = frozenset({"QuantizeLinear", "DequantizeLinear"})
#: Operators of the default domain in every precision: the contract's own list less those that only quantisation brings.
_PLAIN = OPERATORS - _QUANTISING - {_WEIGHT_ONLY}
#: In the contract's list, but in no graph variant that was ever made for TensorRT to compile: both rope layouts, both
#: kinds of attention, sliding window, tied head, plain transformer, FP16 and W8A8, one to three layers.
_NEVER_COMPILED = frozenset({"Equal", "Identity", "Max", "Neg"})


def check_contract_level(case: ParityCase, setup: ParitySetup) -> LevelResult:
    """Hold every graph file of a target against its contract, the operators its runtime has, and the checkpoint.

    Args:
        case: The target.
        setup: Checkpoint and configuration; nothing else is read.

    Returns:
        Eight checks per graph: interface, operators, external data, data flow, caches, attributes, linears, weights. A
        file that is missing or cannot be read is one failed check.
    """
    rounding = setup.tolerances.weight_rounding
    audit = WeightAudit(
        checkpoint=setup.checkpoint,
        precision=case.precision,
        rounding=rounding,
        positions=case.room(setup.config),
        plan=case.plan,
    )
    checks: list[Check] = []
    data: dict[str, Any] = {}
    names = graph_names(setup.config.carried)
    for extra in sorted(set(case.graphs) - set(names)):
        checks.append(failed_check(f"{extra}: file", f"a {setup.config.model_type} model has no {extra} graph"))
    for name in names:
        found, facts = _check_graph(case, setup, name, audit)
        checks += found
        if facts:
            data[name] = facts
    return LevelResult(level=CONTRACT, target=case.target, checks=tuple(checks), data={"graphs": data})


def _check_graph(
    case: ParityCase, setup: ParitySetup, name: str, audit: WeightAudit
) -> tuple[list[Check], dict[str, Any]]:
    path = case.graphs.get(name)
    if path is None:
        expected = ", ".join(graph_names(setup.config.carried))
        return [failed_check(f"{name}: file", f"target {case.target} has no {name} graph, expected {expected}")], {}
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many kinds for a damaged file
        return [failed_check(f"{name}: file", f"{path}: expected a readable ONNX file ({error})")], {}
    spec = case.spec(name, setup.config)
    files, file_problems = _external_files(path)
    problems = {
        "interface": interface_problems(spec, interface_of(model)),
        "operators": _policy_problems(model, case, path),
        "external data": file_problems,
        "data flow": flow_problems(model),
        "caches": cache_problems(model, spec, setup.config),
        "attributes": attribute_problems(model, setup.config),
        "linears": linear_problems(model, setup.config, name, case.precision, case.unroll),
    }
    checks = [claim(f"{name}: {what}", found) for what, found in problems.items()]
    weights, checked = _check_weights(name, model, audit, file_problems)
    facts = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "opset": _opsets(model),
        "operators": _operator_counts(model),
        "inputs": len(model.graph.inputs),
        "outputs": len(model.graph.outputs),
        "external_files": files,
        "weights_checked": checked,
    }
    return [*checks, weights], facts


def _check_weights(name: str, model: ir.Model, audit: WeightAudit, file_problems: Sequence[str]) -> tuple[Check, int]:
    """The weights of one graph; the figures are the largest of the target so far."""
    label = f"{name}: weights"
    if file_problems:  # what lies elsewhere is not opened, not even to look
        return failed_check(label, "not read: the external data must lie beside the graph"), 0
    try:
        problems, checked = audit.problems(name, model)
    except (OSError, ValueError, TypeError) as error:  # a weight file that is too short, or another type than declared
        return failed_check(label, f"the weights cannot be read ({error})"), 0
    if audit.precision in ("w8", "w8a8"):
        check = measured("weight_distance", label, audit.deviation, limit=audit.rounding, failures=problems)
    else:
        check = measured("weights_changed", label, float(audit.different), limit=0.0, failures=problems)
    return check, checked


def _allowed_operators(case: ParityCase) -> frozenset[str]:
    """Operators, those of another domain than ONNX's own with it in front.

    The source of the list is :data:`crt_export.graph.contract.OPERATORS`, what every runtime was seen to parse and run.
    ``com.microsoft::MatMulNBits`` is ONNX Runtime's own and belongs to ``w8`` alone; QuantizeLinear and
    DequantizeLinear belong to ``w8a8``. A compiled target may hold only what was seen to compile.
    """
    allowed = _PLAIN if case.runtime == "onnxruntime" else _PLAIN - _NEVER_COMPILED
    if case.precision == "w8a8":
        allowed |= _QUANTISING
    return allowed | {f"{DOMAIN}::{_WEIGHT_ONLY}"} if _has_contrib(case) else allowed


def _has_contrib(case: ParityCase) -> bool:
    return case.precision == "w8" and case.runtime == "onnxruntime"


def _operator_name(node: ir.Node) -> str:
    """``MatMul`` in the default domain, ``com.microsoft::MatMulNBits`` in another."""
    return node.op_type if node.domain in ("", _DEFAULT_DOMAIN) else f"{node.domain}::{node.op_type}"


def _operator_counts(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs, nested graphs included."""
    return dict(sorted(Counter(map(_operator_name, model.graph.all_nodes())).items()))


def _opsets(model: ir.Model) -> dict[str, int]:
    """Version per domain that the file imports."""
    return {domain or _DEFAULT_DOMAIN: version for domain, version in model.opset_imports.items()}


def _policy_problems(model: ir.Model, case: ParityCase, path: Path) -> Iterator[str]:
    """Foreign operators, wrong opsets, functions, and for a compiled target what TensorRT would compile wrongly."""
    allowed = _allowed_operators(case)
    for name, count in _operator_counts(model).items():
        if name not in allowed:
            example = next(node for node in model.graph.all_nodes() if _operator_name(node) == name)
            yield (
                f"operator {name} ({count} nodes, such as {example.name or '(unnamed)'}) is not allowed in a "
                f"{case.precision} graph for {case.runtime}; allowed are {', '.join(sorted(allowed))}"
            )
    expected = {_DEFAULT_DOMAIN: OPSET, **({DOMAIN: _CONTRIB_OPSET} if _has_contrib(case) else {})}
    found = _opsets(model)
    for domain in sorted(expected.keys() | found.keys()):
        # A graph without the domain's operators need not import it.
        if domain in expected and domain not in found and domain != _DEFAULT_DOMAIN:
            continue
        if expected.get(domain) != found.get(domain):
            yield f"opset of {domain}: expected {expected.get(domain, 'none')}, found {found.get(domain, 'none')}"
    for function in model.functions.values():
        yield f"function {function.domain}::{function.name} hides operators; graphs hold plain nodes only"
    if case.runtime != "onnxruntime":
        try:
            source_graph_from_file(path)
        except BuildError as error:
            yield str(error)


def _external_files(path: Path) -> tuple[list[str], list[str]]:
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
