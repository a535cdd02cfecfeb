"""The schema of ``manifest.json``, version 1."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

from crt_export.bundle.paths import collision_problems, name_problem

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOOL_NAME = "crt-export"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_Types = type | tuple[type, ...]

_TOP: dict[str, _Types] = {
    "tool": dict,
    "libraries": dict,
    "validated": bool,
    "config": dict,
    "model": dict,
    "checkpoint": dict,
    "options": dict,
    "contract": dict,
    "graphs": list,
    "quantization": dict,
    "targets": dict,
    "files": dict,
    "parity": (dict, NoneType),
}
_GRAPH: dict[str, _Types] = {
    "file": str,
    "graph": str,
    "precision": str,
    "unroll": (int, NoneType),
    "weights": (str, NoneType),
    "quantized_matmuls": int,
    "roles": list,
}
#: Who opens a graph: a session of this package, the compiler of an engine, people who load it into a runtime of their
#: own, or validation alone.
GRAPH_ROLES = ("session", "compiler", "interchange", "validation")
_TARGET: dict[str, _Types] = {
    "profile": dict,
    "graphs": dict,
    "engines": dict,
    "capacity": int,
    "unroll": (int, NoneType),
    "cache_dtype": str,
    "prefill": dict,
}
_PREFILL: dict[str, _Types] = {
    "method": str,
    "passes": int,
    "chunk": (int, NoneType),
    "shortest": int,
    "residual_bound": (float, int, NoneType),
    "perplexity_gap": (float, int, NoneType),
}
_PREFILL_METHODS = ("steps", "passes", "adaptive")
_MODEL: dict[str, _Types] = {
    "architecture": str,
    "vocab": int,
    "hidden": int,
    "max_positions": int,
    "tokenizer": str,
    "bos_token_id": (int, NoneType),
    "eos_token_ids": list,
    "states": list,
    "caches": list,
    "rotaries": list,
    "passes": int,
    "parallel": bool,
    "iterated": bool,
    "prompt": str,
    "relative": bool,
}
_STATE: dict[str, _Types] = {"name": str, "shape": list, "dtype": str}
_CACHE: dict[str, _Types] = {
    "name": str,
    "heads": int,
    "query_heads": int,
    "head_dim": int,
    "window": (int, NoneType),
    "rotary": (int, NoneType),
}
_ROTARY: dict[str, _Types] = {"layout": str, "frequencies": list}
_STATE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
#: More states, caches, or values of one of them in a token than any model has: a session's memory is counted in them.
_MOST_PARTS, _MOST_VALUES = 65536, 2**31
_CONTRACT: dict[str, _Types] = {"inputs": list, "outputs": list, "aliases": list, "continues": list}
_TENSOR: dict[str, _Types] = {"name": str, "dtype": str, "dims": list}
_FILE: dict[str, _Types] = {"size": int, "sha256": str}
_CACHE_DTYPES = ("float32", "float16")


def manifest_problems(manifest: Mapping[str, Any]) -> list[str]:
    """Every way in which a parsed manifest breaks the schema; empty if it is valid."""
    problems = _field_problems("the manifest", manifest, _TOP)
    if problems:
        return problems
    if manifest["tool"].get("name") != TOOL_NAME:
        problems.append(f"tool.name must be {TOOL_NAME!r}, found {manifest['tool'].get('name')!r}")
    problems += _field_problems("tool", manifest["tool"], {"version": str})
    problems += _field_problems("checkpoint", manifest["checkpoint"], {"sha256": str})
    problems += _model_problems(manifest["model"])
    problems += _contract_problems(manifest["contract"])
    problems += _file_problems(manifest["files"])
    problems += _graph_problems(manifest["graphs"], manifest["files"])
    problems += _reference_problems("quantization", manifest["quantization"], manifest["files"])
    problems += _target_problems(manifest["targets"], manifest["files"])
    if manifest["validated"] and (manifest["parity"] is None or manifest["parity"].get("passed") is not True):
        problems.append("validated is true, but there is no parity report that passed")
    return problems


def _is(value: object, types: _Types) -> bool:
    """isinstance, except that JSON's true and false are not numbers."""
    if isinstance(value, bool):
        return types is bool
    return isinstance(value, types)


def _type_name(types: _Types) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        int: "an integer",
        float: "a number",
        bool: "true or false",
        NoneType: "null",
    }
    return " or ".join(names[one] for one in (types if isinstance(types, tuple) else (types,)))


def _field_problems(where: str, value: object, fields: Mapping[str, _Types]) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"{where} must be an object, found {value!r:.60}"]
    problems = [f"{where} lacks {name!r}" for name in fields if name not in value]
    for name, types in fields.items():
        if name in value and not _is(value[name], types):
            problems.append(f"{where}: {name!r} must be {_type_name(types)}, found {value[name]!r:.60}")
    return problems


def _contract_problems(contract: Mapping[str, Any]) -> Iterator[str]:
    for graph, spec in contract.items():
        where = f"contract[{graph!r}]"
        broken = _field_problems(where, spec, _CONTRACT)
        yield from broken
        if broken:
            continue
        for side in ("inputs", "outputs"):
            for index, tensor in enumerate(spec[side]):
                yield from _field_problems(f"{where}.{side}[{index}]", tensor, _TENSOR)
        for key in ("aliases", "continues"):
            for index, pair in enumerate(spec[key]):
                if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)):
                    yield f"{where}.{key}[{index}] must be a pair of names, found {pair!r:.60}"


def _model_problems(model: Mapping[str, Any]) -> list[str]:
    """What is no model: types first, then sizes that no session could allocate."""
    problems = _field_problems("model", model, _MODEL)
    if problems:
        return problems
    for key, fields in (("states", _STATE), ("caches", _CACHE), ("rotaries", _ROTARY)):
        if len(model[key]) > _MOST_PARTS:
            return [f"model.{key} holds {len(model[key])}, at most {_MOST_PARTS} are possible"]
        for index, entry in enumerate(model[key]):
            problems += _field_problems(f"model.{key}[{index}]", entry, fields)
    return problems or [*_model_value_problems(model)]


def _model_value_problems(model: Mapping[str, Any]) -> Iterator[str]:
    for key in ("vocab", "hidden", "max_positions", "passes"):
        if not 0 < model[key] < _MOST_VALUES:
            yield f"model: {key!r} must be 1 or more, found {model[key]}"
    for token in (model["bos_token_id"], *model["eos_token_ids"]):
        if token is not None and not (_is(token, int) and 0 <= token < model["vocab"]):
            yield f"model: a token must be in [0, vocab = {model['vocab']}), found {token!r:.60}"
    for index, state in enumerate(model["states"]):
        if not _STATE_NAME.fullmatch(state["name"]) or state["dtype"] != "float32":
            yield f"model.states[{index}]: expected a plain name and float32, found {state['name']!r:.80}"
        if not state["shape"] or not all(_is(size, int) and size > 0 for size in state["shape"]):
            yield f"model.states[{index}]: 'shape' must be sizes of 1 or more, found {state['shape']!r:.60}"
        elif math.prod(state["shape"]) >= _MOST_VALUES:
            yield f"model.states[{index}]: 'shape' is larger than any model's, found {state['shape']!r:.60}"
    for index, cache in enumerate(model["caches"]):
        sizes = [cache[key] for key in ("heads", "query_heads", "head_dim", "window") if cache[key] is not None]
        if not all(0 < size < _MOST_VALUES for size in sizes) or cache["heads"] * cache["head_dim"] >= _MOST_VALUES:
            yield f"model.caches[{index}]: sizes must be 1 or more, found {cache!r:.80}"
    for index, rotary in enumerate(model["rotaries"]):
        numbers = all(_is(value, (int, float)) and math.isfinite(value) for value in rotary["frequencies"])
        if rotary["layout"] not in ("interleaved", "half") or not numbers:
            yield f"model.rotaries[{index}]: expected a layout and finite frequencies, found {rotary!r:.80}"


def _file_problems(files: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"files: {problem}" for problem in collision_problems(files))
    for name, entry in files.items():
        where = f"files[{name!r:.200}]"
        reason = name_problem(name) or ("is the manifest, which cannot list itself" if name == MANIFEST_NAME else None)
        if reason:
            yield f"{where}: the path {reason}"
        broken = _field_problems(where, entry, _FILE)
        yield from broken
        if broken:
            continue
        if entry["size"] < 0:
            yield f"{where}: 'size' must be 0 or more, found {entry['size']}"
        if not _SHA256.fullmatch(entry["sha256"]):
            yield f"{where}: 'sha256' must be 64 lower-case hex digits, found {entry['sha256']!r:.80}"


def _reference_problems(where: str, references: Mapping[str, Any], files: Mapping[str, Any]) -> Iterator[str]:
    for key, name in references.items():
        if not isinstance(name, str):
            yield f"{where}[{key!r}] must be a file name, found {name!r:.60}"
        elif name not in files:
            yield f"{where}[{key!r}] is {name!r}, which is not listed in 'files'"


def _graph_problems(graphs: Sequence[Any], files: Mapping[str, Any]) -> Iterator[str]:
    for index, graph in enumerate(graphs):
        where = f"graphs[{index}]"
        broken = _field_problems(where, graph, _GRAPH)
        yield from broken
        if broken:
            continue
        named = {key: graph[key] for key in ("file", "weights") if graph[key] is not None}
        yield from _reference_problems(where, named, files)
        if not graph["roles"] or any(role not in GRAPH_ROLES for role in graph["roles"]):
            yield f"{where}: 'roles' must be some of {', '.join(GRAPH_ROLES)}, found {graph['roles']!r:.80}"


def _target_problems(targets: Mapping[str, Any], files: Mapping[str, Any]) -> Iterator[str]:
    for name, target in targets.items():
        where = f"targets[{name!r}]"
        broken = _field_problems(where, target, _TARGET)
        yield from broken
        if not broken:
            yield from _target_value_problems(where, target)
            yield from _reference_problems(f"{where}.graphs", target["graphs"], files)
            yield from _reference_problems(f"{where}.engines", target["engines"], files)


def _target_value_problems(where: str, target: Mapping[str, Any]) -> Iterator[str]:
    """Sizes and a dtype that no session could allocate."""
    for key in ("capacity", "unroll"):
        if target[key] is not None and target[key] < 1:
            yield f"{where}: {key!r} must be 1 or more, found {target[key]}"
    if target["cache_dtype"] not in _CACHE_DTYPES:
        yield f"{where}: 'cache_dtype' must be 'float32' or 'float16', found {target['cache_dtype']!r:.60}"
    yield from _prefill_problems(f"{where}.prefill", target["prefill"])


def _prefill_problems(where: str, plan: Any) -> Iterator[str]:
    broken = _field_problems(where, plan, _PREFILL)
    if broken:
        yield from broken
        return
    if plan["method"] not in _PREFILL_METHODS:
        yield f"{where}: 'method' must be one of {', '.join(_PREFILL_METHODS)}, found {plan['method']!r:.60}"
    for key in ("passes", "chunk", "shortest"):
        if plan[key] is not None and plan[key] < 1:
            yield f"{where}: {key!r} must be 1 or more, found {plan[key]}"
    bound, gap = plan["residual_bound"], plan["perplexity_gap"]
    if bound is not None and not 0 < bound < math.inf:
        yield f"{where}: 'residual_bound' must be a number above 0, found {bound}"
    if gap is not None and not 0 <= gap < math.inf:
        yield f"{where}: 'perplexity_gap' must be a number of at least 0, found {gap}"
    if plan["method"] == "adaptive" and bound is None:
        yield f"{where}: 'adaptive' needs a 'residual_bound'"
