"""Interchange: the graphs that other runtimes load, tied to the graph that a session loads.

A session on a CPU loads one graph for steps and prefill alike. ``step.onnx`` and the K-fold ``prefill.onnx`` lie beside
it for everybody without this runtime, so whatever the evidence says of a session's graph must hold for them too. Fed
the same, one row at a time, ``step`` delivers the same to the last bit, token by token; ``prefill`` does where the
cache is empty. Behind a past, its passes but the last see the chunk after the whole cache and not after the past: the
same sums in another order, which agree to rounding. So does ``step`` of a plain transformer: its last sum has no
reader but the norm behind it, and ONNX Runtime fuses the two (SkipLayerNormalization), which it cannot where prefill
picks the last token in between.

A target whose session loads a graph for each has no such graphs. There one token through the step graph and through a
pass must agree to rounding: what quantisation costs against PyTorch cancels, so a mask, a position or a rotation that
is wrong in one of them shows far below the limits that INT8 needs elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crt_export.engine.onnxruntime import OrtGraph
from crt_export.errors import ContractError, UnsupportedError
from crt_export.models.declaration import ITERATE, NEXT_ITERATE, NEXT_STATE, STATE
from crt_export.parity.difference import relative_error
from crt_export.parity.metrics import Check, failed_check, measured
from crt_export.parity.one_step_calls import OneStepCalls
from crt_export.parity.reference import PREFILL, PREFILL_PASS, STEP
from crt_export.parity.runner import Runner
from crt_export.parity.setup import ParitySetup
from crt_export.spec import graph_spec

Arrays = Mapping[str, NDArray[Any]]
#: Where a call is, what it is given, and what a session's graph delivers.
Call = tuple[str, Arrays, Arrays]
#: Where a call is, what was found and what is expected, every output by name.
Pair = tuple[str, Arrays, Arrays]

#: Tokens that the step graph is fed, and that prefill takes at once; fewer where the target has no room for so many.
TOKENS = 256
#: A capacity that is a multiple of this keeps an empty cache from shifting a chunk among the lanes of a vector.
_ALIGNED = 64
_PROMPTS = 3


def session_outputs(runner: Runner, graph: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """One call with inputs of any kind, through the graph that a session takes for it and by its batching rule.

    Args:
        runner: The target.
        graph: ``step``, ``prefill``, ``prefill_pass`` or ``head``.
        inputs: At least those of that graph, and ``length`` and ``hidden`` of a first iterate where a session makes
            the call through another one.

    Returns:
        What that graph delivers.

    Raises:
        ContractError: The graph cannot be loaded or run.
        UnsupportedError: The target has no such graph.
    """
    if graph == "head":
        return {"logits": runner.head(inputs["hidden"])}
    program = runner.engine.program(runner.graph_name(graph))
    assert isinstance(program, OrtGraph), "evidence runs on ONNX Runtime"
    passes = runner.target.unroll or 1 if graph == PREFILL and runner.one_graph else 1
    specs = runner.config.carried.states
    iterates = [(spec.tensor(NEXT_ITERATE), spec.tensor(ITERATE)) for spec in specs]
    count = len(inputs["input_ids"])
    size = count if runner.target.rows_are_independent else 1
    parts = []
    for row in range(0, count, size):
        given = {spec.name: inputs[spec.name][row : row + size] for spec in program.inputs}
        found = program.run(given)
        for _ in range(passes - 1):
            found = program.run({**given, **{source: found[output] for output, source in iterates}})
        parts.append(found)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def interchange_checks(runner: Runner, setup: ParitySetup, calls: OneStepCalls) -> list[Check]:
    """Hold the graphs that no session loads to the one that it does, or a step to a pass where it loads both.

    Args:
        runner: The target.
        setup: Text and limits.
        calls: Calls of one graph, with chunks of every kind.

    Returns:
        One check per graph and rule; for what cannot run one that says so.
    """
    if not runner.one_graph:
        other = PREFILL_PASS if runner.config.carried.iterated else PREFILL
        name = f"{STEP} against {other} of one token"
        pairs = _same_calls(runner, STEP, other, calls)
        return [_judged(name, lambda: closeness(name, pairs, runner, setup, "consistency"))]
    session, steps = runner.graph_name(STEP), min(TOKENS, runner.target.capacity)
    stepped = _pairs(partial(runner.load, STEP), _steps(runner, setup, steps))
    close = f"{STEP}: {steps} tokens are {steps} calls of {session}"
    if not runner.config.carried.iterated:
        return [_judged(close, lambda: closeness(close, stepped, runner, setup, "tensor_error"))]
    exact = f"{close}, bit by bit"
    return [_judged(exact, lambda: exactness(exact, stepped, steps)), *_prefill_checks(runner, setup, calls, session)]


def _prefill_checks(runner: Runner, setup: ParitySetup, calls: OneStepCalls, session: str) -> list[Check]:
    """K passes in one graph against K calls of the graph of one pass: to the bit, and behind a past to rounding."""
    passes = runner.target.unroll or 1
    load = cache(partial(runner.load, PREFILL))
    close = f"{PREFILL}: {passes} passes are {passes} calls of {session}"
    exact, prompts, chunks = f"{close}, bit by bit", _prompts(runner, setup), _chunks(runner, calls)
    return [
        _judged(exact, lambda: exactness(exact, _pairs(load, prompts), _PROMPTS)),
        _judged(close, lambda: closeness(close, _pairs(load, chunks), runner, setup, "tensor_error")),
    ]


def exactness(name: str, pairs: Iterable[Pair], asked: int) -> Check:
    """Judge calls that must agree to the bit.

    Args:
        name: Of the check.
        pairs: Per call where it is, what was found and what is expected: every output by name.
        asked: How many calls there must be.

    Returns:
        The number of values that differ in the first call where any do. NaN, infinity, an output that is missing, of
        another dtype or shape or without elements, and fewer calls than asked fail.
    """
    compared = 0
    for where, found, expected in pairs:
        compared += 1
        differing, problems = _differences(found, expected, where)
        if problems:
            return measured("bit_differences", name, differing, limit=0.0, failures=problems)
    missing = () if compared >= max(asked, 1) else (f"{compared} of {asked} calls were compared",)
    return measured("bit_differences", name, None if missing else 0.0, limit=0.0, failures=missing)


def closeness(name: str, pairs: Iterable[Pair], runner: Runner, setup: ParitySetup, metric: str) -> Check:
    """Judge calls that must agree to rounding: the largest |difference| over the largest |value| of any output."""
    precision, largest, place = runner.target.profile.precision, float("nan"), ""
    for where, found, expected in pairs:
        for tensor, values in expected.items():
            if tensor == "next_token":  # either of two near ties
                continue
            # A residual is a difference of hidden states and is off as they are; a position is right or wrong.
            scale = np.abs(expected["next_hidden" if tensor == "residual" else tensor]).max()
            exact = values.dtype.kind == "f" or np.array_equal(found[tensor], values)
            error = relative_error(found[tensor], values, float(scale)) if exact else float("inf")
            if place == "" or not error <= largest:  # NaN is larger than any
                largest, place = error, f"in {tensor} {where}"
    limit = getattr(setup.limits(precision), metric)
    return measured(metric, name, largest, limit=limit, precision=precision, where=place)


def _judged(name: str, judge: Callable[[], Check]) -> Check:
    try:
        return judge()
    except (ContractError, UnsupportedError) as error:
        return failed_check(name, str(error))


def _differences(found: Arrays, expected: Arrays, where: str) -> tuple[float | None, list[str]]:
    """How many values differ, and a sentence on every output that does."""
    count, problems = 0, [] if expected else [f"no output is compared {where}"]
    for name, wanted in expected.items():
        values = found.get(name)
        if values is None:
            problems.append(f"{name} is missing {where}")
        elif (values.dtype, values.shape) != (wanted.dtype, wanted.shape) or not values.size:
            problems.append(
                f"{name} is {values.dtype} {list(values.shape)}, expected {wanted.dtype} {list(wanted.shape)} {where}"
            )
        elif values.dtype.kind == "f" and not np.isfinite(values).all():
            problems.append(f"{name} is NaN or infinite {where}")
        elif values.tobytes() != wanted.tobytes():
            differ = values.view(f"u{values.itemsize}") != wanted.view(f"u{wanted.itemsize}")
            count += int(differ.sum())
            place = tuple(int(index) for index in np.argwhere(differ)[0])
            problems.append(
                f"{name} differs in {int(differ.sum())} of {differ.size} values {where}, first at {list(place)}: "
                f"expected {wanted[place]:.9g}, found {values[place]:.9g}"
            )
    return float(count) if count else None, problems


def _steps(runner: Runner, setup: ParitySetup, steps: int) -> Iterator[Call]:
    """Token by token from an empty cache, both fed what the session's graph delivers."""
    inputs = _empty(runner, steps, seq=1)
    for position, token in enumerate(np.resize(setup.text.ids, steps)):
        inputs |= {"input_ids": np.array([[token]]), "position": np.array([position])}
        outputs = session_outputs(runner, STEP, inputs)
        yield f"at token {position}", inputs, outputs
        pairs = {name: name.replace("present_", "past_") for name in outputs if name.startswith("present_")}
        pairs |= {spec.tensor(NEXT_STATE): spec.tensor(STATE) for spec in runner.config.carried.states}
        inputs |= {name: outputs[output] for output, name in pairs.items()}


def _prompts(runner: Runner, setup: ParitySetup) -> Iterator[Call]:
    """Chunks of an empty cache: a long one, one padded on the right, one with nothing but padding."""
    room = min(TOKENS, runner.target.capacity, runner.engine.max_tokens)
    for length in (room, room // 2 + 1, 0):
        inputs = _empty(runner, -(-room // _ALIGNED) * _ALIGNED, seq=room)
        inputs["input_ids"][0, :length] = np.resize(setup.text.ids, length)
        inputs["length"][:] = length
        yield f"over {length} of {room} tokens", inputs, session_outputs(runner, PREFILL, inputs)


def _chunks(runner: Runner, calls: OneStepCalls) -> Iterator[Call]:
    """Row by row: a start, a continuation, padded ones, each from a first iterate of zeros and from a wrong one."""
    for call in calls.of(PREFILL):
        for row, place in enumerate(call.rows):
            inputs = {name: values[row : row + 1] for name, values in call.inputs.items()}
            yield f"({place}; {call.name})", inputs, session_outputs(runner, PREFILL, inputs)


def _pairs(load: Callable[[], OrtGraph], calls: Iterable[Call]) -> Iterator[Pair]:
    """What a graph gives for some calls beside what a session's graph does."""
    loaded = load()
    for where, inputs, outputs in calls:
        found = loaded.run({spec.name: inputs[spec.name] for spec in loaded.inputs})
        yield where, found, {spec.name: outputs[spec.name] for spec in loaded.outputs}


def _same_calls(runner: Runner, graph: str, other: str, calls: OneStepCalls) -> Iterator[Pair]:
    for call in calls.of(graph):
        found, expected = (session_outputs(runner, name, call.inputs) for name in (other, graph))
        yield f"({call.name})", found, expected


def _empty(runner: Runner, capacity: int, *, seq: int) -> dict[str, NDArray[Any]]:
    """Inputs of a first call: one row of ``seq`` tokens, room for ``capacity``, a first iterate of zeros."""
    sizes = {"batch": 1, "seq": seq, "capacity": capacity}
    spec = graph_spec(runner.graph_name(STEP), runner.config, runner.target.cache_dtype)
    shapes = {t.name: [sizes[dim] if isinstance(dim, str) else dim for dim in t.dims] for t in spec.inputs}
    inputs = {tensor.name: np.zeros(shapes[tensor.name], tensor.dtype) for tensor in spec.inputs}
    return {**inputs, "length": np.array([seq])}
