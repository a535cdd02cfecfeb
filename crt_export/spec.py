"""The tensor contract of the exported graphs, parsed from ``graphs/*.toml``.

One definition feeds the exporter, the contract check, the runtime, the manifest and the documentation.

A definition has ``name``, ``summary``, optionally ``models = "recurrent"`` (a plain transformer has no such graph), and
tables ``inputs`` and ``outputs`` with: ``name`` (``{i}`` stands for the layer), ``dtype`` (``cache`` is resolved per
precision), ``dims``, ``meaning``, optionally ``models = "recurrent"`` and ``alias`` (the input that an output updates
in place). Symbolic dims come from one glossary: batch, seq, capacity, heads, head_dim, hidden, vocab.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from crt_export.catalog import definition_path
from crt_export.config import ModelConfig
from crt_export.errors import ContractError, UnsupportedError, problem_list

GRAPH_NAMES = ("step", "prefill", "prefill_pass", "head")
#: Dims that stay symbolic in the exported ONNX; all others are fixed by the checkpoint.
SYMBOLIC_DIMS = ("batch", "seq", "capacity")
_GLOSSARY = (*SYMBOLIC_DIMS, "heads", "head_dim", "hidden", "vocab")
_DTYPES = ("int64", "float32", "float16", "cache")
_TENSOR_KEYS = {"name", "dtype", "dims", "meaning", "models", "alias"}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output: a name, a dtype, and dims that are sizes or glossary names."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]
    meaning: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return {"name": self.name, "dtype": self.dtype, "dims": list(self.dims)}

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """Inputs and outputs of one graph in order; ``aliases`` are (present output, past input) pairs."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return {
            "inputs": [tensor.to_dict() for tensor in self.inputs],
            "outputs": [tensor.to_dict() for tensor in self.outputs],
            "aliases": [list(pair) for pair in self.aliases],
        }

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> GraphSpec:
        """Read the entry of a manifest.

        Raises:
            ContractError: The entry is not one this class wrote.
        """
        try:
            tensors = {
                side: tuple(
                    TensorSpec(name=str(t["name"]), dtype=str(t["dtype"]), dims=tuple(t["dims"])) for t in values[side]
                )
                for side in ("inputs", "outputs")
            }
            aliases = tuple((str(present), str(past)) for present, past in values["aliases"])
        except (KeyError, TypeError, ValueError) as error:
            raise ContractError(f"contract of graph {name!r}: malformed entry ({error!r})") from None
        return cls(name=name, aliases=aliases, **tensors)


class Interface(Protocol):
    """What a graph reads and writes: a contract, a file, or what a runtime loaded."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it reads."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it writes."""
        ...


def same_dims(wanted: int | str, found: int | str) -> bool:
    """Rule for files: sizes and names are equal."""
    return wanted == found


def same_sizes(wanted: int | str, found: int | str) -> bool:
    """Rule for compiled engines, which know no names: what is dynamic there is dynamic (-1) here."""
    return wanted == found or (isinstance(wanted, str) and found == -1)


def compatible_sizes(wanted: int | str, found: int | str) -> bool:
    """Rule for loaded graphs: a runtime renames dims, and may know a size that the contract leaves open."""
    return wanted == found or isinstance(wanted, str) or isinstance(found, str)


def interface_problems(
    wanted: Interface, found: Interface, same: Callable[[int | str, int | str], bool] = same_dims
) -> Iterator[str]:
    """Every difference between what a graph should read and write and what it does, one sentence each.

    Args:
        wanted: Usually the contract.
        found: Of a file, an engine, or a loaded graph.
        same: Whether two dims, expected and found, agree. Only files keep the order of their tensors.
    """
    for kind, expected, there in (("input", wanted.inputs, found.inputs), ("output", wanted.outputs, found.outputs)):
        tensors = {spec.name: spec for spec in there}
        for spec in expected:
            other = tensors.pop(spec.name, None)
            if other is None:
                yield f"{kind} {spec} expected, nothing found"
            elif other.dtype != spec.dtype or not _same_shape(spec.dims, other.dims, same):
                yield f"{kind} {spec} expected, {other} found"
        yield from (f"{kind} {spec} found, which is not part of the contract" for spec in tensors.values())
        order = [spec.name for spec in expected]
        names = [spec.name for spec in there]
        if same is same_dims and names != order and sorted(names) == sorted(order):
            yield f"{kind}s expected in order {', '.join(order)}, found in order {', '.join(names)}"


def _same_shape(
    wanted: tuple[int | str, ...], found: tuple[int | str, ...], same: Callable[[int | str, int | str], bool]
) -> bool:
    return len(wanted) == len(found) and all(map(same, wanted, found))


def graph_names(config: ModelConfig) -> tuple[str, ...]:
    """The graphs a model of this kind has."""
    return tuple(name for name in GRAPH_NAMES if config.recurrent or _definition(name).get("models") != "recurrent")


def graph_spec(name: str, config: ModelConfig, cache_dtype: str, capacity: int | None = None) -> GraphSpec:
    """Resolve one contract for a model.

    Args:
        name: step, prefill, prefill_pass or head.
        config: Fixes heads, head_dim, hidden, vocab and the number of layers.
        cache_dtype: float32 or float16.
        capacity: Cache length; None leaves it symbolic.

    Raises:
        ContractError: The definition file is malformed.
        UnsupportedError: A model of this kind has no such graph.
    """
    definition = _definition(name)
    if name not in graph_names(config):
        raise UnsupportedError(f"a {config.model_type} model has no {name} graph")
    sizes: dict[str, int] = {
        "heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
    }
    if capacity is not None:
        sizes["capacity"] = capacity
    sides: dict[str, tuple[TensorSpec, ...]] = {}
    for side in ("inputs", "outputs"):
        sides[side] = tuple(
            TensorSpec(
                name=entry["name"],
                dtype=cache_dtype if entry["dtype"] == "cache" else entry["dtype"],
                dims=tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in entry["dims"]),
                meaning=entry["meaning"],
            )
            for entry in _entries(definition[side], config)
        )
    aliases = tuple((e["name"], e["alias"]) for e in _entries(definition["outputs"], config) if "alias" in e)
    return GraphSpec(name=name, aliases=aliases, **sides)


def _entries(tables: list[dict[str, Any]], config: ModelConfig) -> Iterator[dict[str, Any]]:
    """The tensors that exist for this model, per-layer ones repeated layer by layer in the order they are written."""
    tables = [table for table in tables if config.recurrent or table.get("models") != "recurrent"]
    per_layer = [table for table in tables if "{i}" in table["name"]]
    for table in tables:
        if "{i}" not in table["name"]:
            yield table
        elif table is per_layer[0]:
            for i in range(config.num_hidden_layers):
                for group in per_layer:
                    yield {
                        key: value.replace("{i}", str(i)) if isinstance(value, str) else value
                        for key, value in group.items()
                    }


@cache
def _definition(name: str) -> dict[str, Any]:
    path = definition_path("graphs", f"{name}.toml")
    try:
        definition = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ContractError(f"{path}: not a TOML file ({error})") from None
    problems = [*_definition_problems(name, definition)]
    if problems:
        raise ContractError(problem_list(str(path), problems))
    return definition


def _definition_problems(name: str, definition: Mapping[str, Any]) -> Iterator[str]:
    if definition.get("name") != name:
        yield f"name is {definition.get('name')!r}, the file is {name}.toml"
    for side in ("inputs", "outputs"):
        for entry in definition.get(side, []):
            label = f"{side} {entry.get('name')!r}"
            if set(entry) - _TENSOR_KEYS or not {"name", "dtype", "dims", "meaning"} <= set(entry):
                yield f"{label}: keys are {sorted(entry)}, known are {sorted(_TENSOR_KEYS)}"
            elif entry["dtype"] not in _DTYPES:
                yield f"{label}: dtype {entry['dtype']!r}, expected one of {', '.join(_DTYPES)}"
            elif any(isinstance(dim, str) and dim not in _GLOSSARY for dim in entry["dims"]):
                yield f"{label}: dims {entry['dims']}, names must come from {', '.join(_GLOSSARY)}"
        if not definition.get(side):
            yield f"no {side}"
    past = {entry.get("name") for entry in definition.get("inputs", [])}
    for entry in definition.get("outputs", []):
        if "alias" in entry and entry["alias"] not in past:
            yield f"output {entry['name']!r} aliases {entry['alias']!r}, which is no input"
