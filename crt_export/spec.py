"""The tensor contract of the exported graphs, parsed from ``graphs/*.toml``.

One definition and a model's declaration feed the exporter, the contract check, the runtime, the manifest and the
documentation. A definition has ``name``, ``summary``, optionally ``when = "iterated"`` (only models whose chunks take
several passes have such a graph), and tables ``inputs`` and ``outputs`` with:

* ``name``, ``dtype`` (``cache`` is resolved per precision), ``dims``, ``meaning``;
* optionally ``for_each``: ``cache`` (``{i}`` in names is its number; dims heads and head_dim are its own) or ``state``
  (``{name}`` is its name, see :meth:`crt_export.models.declaration.StateSpec.tensor`; dim ``*shape`` is spliced), and
  ``when``;
* of outputs optionally ``alias`` (the input that it updates in place) or ``continues`` (the input of the next call that
  it becomes, in another buffer).

A tensor that is named twice is one: what the head reads may be a state as well. Symbolic dims come from one glossary:
batch, seq, capacity, heads, head_dim, hidden, vocab.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from crt_export.catalog import definition_path
from crt_export.errors import ContractError, UnsupportedError, problem_list
from crt_export.models.declaration import CacheSpec, Carried, StateSpec

GRAPH_NAMES = ("step", "prefill", "prefill_pass", "head")
#: Dims that stay symbolic in the exported ONNX; all others are fixed by the checkpoint.
SYMBOLIC_DIMS = ("batch", "seq", "capacity")
_GLOSSARY = (*SYMBOLIC_DIMS, "heads", "head_dim", "hidden", "vocab")
_DTYPES = ("int64", "float32", "float16", "cache")
_SHAPE = "*shape"
_TENSOR_KEYS = {"name", "dtype", "dims", "meaning", "for_each", "when", "alias", "continues"}
_WHEN, _FOR_EACH = ("iterated",), ("cache", "state")


class Declared(Protocol):
    """A model as its graphs need to know it: its configuration, or what a bundle's manifest says."""

    @property
    def model_type(self) -> str:
        """Name of the architecture, for messages."""
        ...

    @property
    def vocab_size(self) -> int:
        """Logits of a token."""
        ...

    @property
    def hidden_size(self) -> int:
        """Size of what the head reads."""
        ...

    @property
    def carried(self) -> Carried:
        """What it carries from token to token."""
        ...


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output: a name, a dtype, and dims that are sizes or glossary names.

    ``group`` is ``cache``, ``state`` or ``iterate`` for tensors of which a model may have any number.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...]
    meaning: str = field(default="", compare=False)
    group: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return {"name": self.name, "dtype": self.dtype, "dims": list(self.dims)}

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """Inputs and outputs of one graph in order.

    ``aliases`` are pairs (output, input it updates in place), ``continues`` pairs (output, input of the next call).
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: tuple[tuple[str, str], ...]
    continues: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return {
            "inputs": [tensor.to_dict() for tensor in self.inputs],
            "outputs": [tensor.to_dict() for tensor in self.outputs],
            "aliases": [list(pair) for pair in self.aliases],
            "continues": [list(pair) for pair in self.continues],
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
            aliases, continues = (
                tuple((str(output), str(source)) for output, source in values[key]) for key in ("aliases", "continues")
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ContractError(f"contract of graph {name!r}: malformed entry ({error!r})") from None
        return cls(name=name, aliases=aliases, continues=continues, **tensors)


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


def graph_names(carried: Carried) -> tuple[str, ...]:
    """The graphs a model of this kind has."""
    return tuple(name for name in GRAPH_NAMES if _applies(_definition(name), carried))


def graph_spec(name: str, model: Declared, cache_dtype: str, capacity: int | None = None) -> GraphSpec:
    """Resolve one contract for a model.

    Args:
        name: step, prefill, prefill_pass or head.
        model: Fixes hidden, vocab, states and caches.
        cache_dtype: float32 or float16.
        capacity: Cache length; None leaves it symbolic.

    Raises:
        ContractError: The definition file is malformed.
        UnsupportedError: A model of this kind has no such graph.
    """
    definition = _definition(name)
    if name not in graph_names(model.carried):
        raise UnsupportedError(f"a {model.model_type} model has no {name} graph")
    sizes: dict[str, int] = {"hidden": model.hidden_size, "vocab": model.vocab_size}
    if capacity is not None:
        sizes["capacity"] = capacity
    sides: dict[str, tuple[TensorSpec, ...]] = {}
    pairs: dict[str, dict[str, str]] = {"alias": {}, "continues": {}}
    for side in ("inputs", "outputs"):
        tensors: dict[str, TensorSpec] = {}
        for entry, of in _entries(definition[side], model.carried):
            resolve = _resolver(of)
            tensor = TensorSpec(
                name=resolve(entry["name"]),
                dtype=cache_dtype if entry["dtype"] == "cache" else entry["dtype"],
                dims=tuple(_dims(entry["dims"], sizes, of)),
                meaning=entry["meaning"],
                group="iterate" if entry["name"].startswith("iterate.") else entry.get("for_each", ""),
            )
            tensors.setdefault(tensor.name, tensor)
            for key, found in pairs.items():
                if key in entry:
                    found[tensor.name] = resolve(entry[key])
        sides[side] = tuple(tensors.values())
    return GraphSpec(
        name=name, aliases=tuple(pairs["alias"].items()), continues=tuple(pairs["continues"].items()), **sides
    )


@dataclass(frozen=True)
class _Numbered:
    """A cache and its number."""

    index: int
    spec: CacheSpec


def _applies(table: Mapping[str, Any], carried: Carried) -> bool:
    return carried.iterated or table.get("when") != "iterated"


def _entries(
    tables: list[dict[str, Any]], carried: Carried
) -> Iterator[tuple[dict[str, Any], _Numbered | StateSpec | None]]:
    """The tensors that this model has; those of one cache or state stand together, in the order they are written."""
    each: dict[str, list[Any]] = {
        "cache": [_Numbered(index, spec) for index, spec in enumerate(carried.caches)],
        "state": list(carried.states),
    }
    tables = [table for table in tables if _applies(table, carried)]
    for number, table in enumerate(tables):
        kind = table.get("for_each")
        if kind is None:
            yield table, None
        elif number and tables[number - 1].get("for_each") == kind == "cache":
            continue  # stands with the one before it
        else:
            together = [table]
            if kind == "cache":
                together = [other for other in tables[number:] if other.get("for_each") == "cache"]
            for of in each[kind]:
                yield from ((entry, of) for entry in together)


def _resolver(of: _Numbered | StateSpec | None) -> Callable[[str], str]:
    """What a name in a definition is called for one cache or state."""
    if isinstance(of, _Numbered):
        return lambda pattern: pattern.replace("{i}", str(of.index))
    return (lambda pattern: pattern) if of is None else of.tensor


def _dims(dims: list[int | str], sizes: Mapping[str, int], of: _Numbered | StateSpec | None) -> Iterator[int | str]:
    own = {"heads": of.spec.heads, "head_dim": of.spec.head_dim} if isinstance(of, _Numbered) else {}
    for dim in dims:
        if dim == _SHAPE and isinstance(of, StateSpec):
            yield from of.shape
        else:
            yield {**sizes, **own}.get(dim, dim) if isinstance(dim, str) else dim


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
            elif any(isinstance(dim, str) and dim not in (*_GLOSSARY, _SHAPE) for dim in entry["dims"]):
                yield f"{label}: dims {entry['dims']}, names must come from {', '.join(_GLOSSARY)}"
            elif entry.get("for_each", "cache") not in _FOR_EACH or entry.get("when", "iterated") not in _WHEN:
                yield f"{label}: for_each is one of {', '.join(_FOR_EACH)}, when one of {', '.join(_WHEN)}"
        if not definition.get(side):
            yield f"no {side}"
    past = {entry.get("name") for entry in definition.get("inputs", [])}
    for entry in definition.get("outputs", []):
        if "alias" in entry and entry["alias"] not in past:
            yield f"output {entry['name']!r} aliases {entry['alias']!r}, which is no input"
        if "continues" in entry and entry["continues"] not in past:
            yield f"output {entry['name']!r} continues {entry['continues']!r}, which is no input"
