"""Level L0: are the files what was agreed?

Nothing is run. Every graph of the target is held against the contract of ``graphs/*.toml``, against a list of operators
and opsets, and against the checkpoint, weight by weight; see :mod:`crt_export.parity.graph_policy`,
:mod:`crt_export.parity.data_flow`, :mod:`crt_export.parity.linear_forms` and :mod:`crt_export.parity.weight_audit`.

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

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from crt_export.graph.contract import interface_problems
from crt_export.ladder import CONTRACT
from crt_export.parity.attribute_audit import attribute_problems
from crt_export.parity.case import ParityCase
from crt_export.parity.data_flow import cache_problems, flow_problems
from crt_export.parity.graph_policy import external_files, operator_counts, opsets, policy_problems
from crt_export.parity.level import Check, LevelResult, ParitySetup, failed_check
from crt_export.parity.linear_forms import linear_problems
from crt_export.parity.weight_audit import WeightAudit
from crt_export.spec import graph_names


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
    audit = WeightAudit(checkpoint=setup.checkpoint, precision=case.precision, rounding=rounding)
    checks: list[Check] = []
    data: dict[str, Any] = {}
    names = graph_names(setup.config)
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
        expected = ", ".join(graph_names(setup.config))
        return [failed_check(f"{name}: file", f"target {case.target} has no {name} graph, expected {expected}")], {}
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many kinds for a damaged file
        return [failed_check(f"{name}: file", f"{path}: expected a readable ONNX file ({error})")], {}
    spec = case.spec(name, setup.config)
    files, file_problems = external_files(path)
    checks = [
        _verdict(name, "interface", interface_problems(model, spec)),
        _verdict(name, "operators", policy_problems(model, case, path)),
        _verdict(name, "external data", file_problems),
        _verdict(name, "data flow", flow_problems(model)),
        _verdict(name, "caches", cache_problems(model, spec)),
        _verdict(name, "attributes", attribute_problems(model, setup.config, case.cache_head_dim)),
        _verdict(name, "linears", linear_problems(model, setup.config, name, case.precision, case.unroll)),
    ]
    weights, checked = _check_weights(name, model, audit, file_problems)
    facts = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "opset": opsets(model),
        "operators": operator_counts(model),
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
        figure, value = "distance from the checkpoint, quantisation steps", audit.deviation
        limit, tolerance = audit.rounding, "shared.weight_rounding"
    else:
        figure, value = "values that differ from the checkpoint", float(audit.different)
        limit, tolerance = 0.0, ""
    check = Check(
        name=label,
        figure=figure,
        value=value,
        limit=limit,
        tolerance=tolerance,
        passed=not problems,
        failures=tuple(problems),
    )
    return check, checked


def _verdict(graph: str, claim: str, problems: object) -> Check:
    found = tuple(str(problem) for problem in problems)  # type: ignore[attr-defined]
    return Check(name=f"{graph}: {claim}", passed=not found, failures=found)
