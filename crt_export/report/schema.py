"""Hold a document against a published schema: ``validate/report.schema.json``, ``validate/bench.schema.json``.

The part of JSON Schema 2020-12 that the schemas use is checked here, so that reading a report needs no package beyond
the core; a test compares the verdicts with those of ``jsonschema``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from crt_export.catalog import definition_path

SCHEMA_FILE = "report.schema.json"
BENCH_SCHEMA_FILE = "bench.schema.json"

Schema = Mapping[str, Any]
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "number": (int, float),
    "null": (type(None),),
}


@cache
def report_schema() -> dict[str, Any]:
    """The schema of parity reports as it is published; treat it as read-only.

    Raises:
        MissingDependencyError: The installation lacks the file.
    """
    return json.loads(definition_path("validate", SCHEMA_FILE).read_text(encoding="utf-8"))


@cache
def bench_schema() -> dict[str, Any]:
    """Likewise the schema of benchmarks.

    Raises:
        MissingDependencyError: The installation lacks the file.
    """
    return json.loads(definition_path("validate", BENCH_SCHEMA_FILE).read_text(encoding="utf-8"))


def schema_problems(document: object, root: Schema | None = None, where: str = "report") -> Iterator[str]:
    """What is wrong with a document, one sentence each with the place; nothing where it fits the schema.

    Args:
        document: What was parsed from JSON.
        root: The schema; None is that of parity reports.
        where: What the document is called in the sentences.

    Raises:
        MissingDependencyError: The installation lacks the schema.
    """
    whole = report_schema() if root is None else root
    yield from _Checker(whole).problems(document, whole, where)


class _Checker:
    """Every keyword that the schemas use; unknown keywords would be an omission, which a test looks for."""

    def __init__(self, root: Schema) -> None:
        self._definitions = root.get("$defs", {})

    def problems(self, value: object, schema: Schema, where: str) -> Iterator[str]:
        if "$ref" in schema:
            yield from self.problems(value, self._definitions[schema["$ref"].rpartition("/")[2]], where)
        wrong = _kind_problem(value, schema)
        if wrong:
            yield f"{where}: {wrong}"
            return
        if "anyOf" in schema and not any(self._fits(value, option) for option in schema["anyOf"]):
            yield f"{where}: fits none of the {len(schema['anyOf'])} forms it may have, found {_shown(value)}"
        for branch in schema.get("allOf", ()):
            if self._fits(value, branch["if"]):
                yield from self.problems(value, branch["then"], where)
        if isinstance(value, dict):
            yield from self._object_problems(value, schema, where)
        elif isinstance(value, list) and "items" in schema:
            for index, item in enumerate(value):
                yield from self.problems(item, schema["items"], f"{where}[{index}]")

    def _object_problems(self, value: Mapping[str, Any], schema: Schema, where: str) -> Iterator[str]:
        yield from (f"{where}: no {key!r}" for key in schema.get("required", ()) if key not in value)
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, item in value.items():
            place = f"{where}.{key}"
            if key in known:
                yield from self.problems(item, known[key], place)
            elif others is False:
                yield f"{where}: unknown key {key!r}"
            elif others is not True:
                yield from self.problems(item, others, place)

    def _fits(self, value: object, schema: Schema) -> bool:
        return next(self.problems(value, schema, ""), None) is None


def _kind_problem(value: object, schema: Schema) -> str:
    """What is wrong with the value itself, apart from what it holds."""
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"expected {' or '.join(kinds)}, found {_shown(value)}"
    if "const" in schema and not _equal(value, schema["const"]):
        return f"expected {schema['const']!r}, found {_shown(value)}"
    if "enum" in schema and not any(_equal(value, option) for option in schema["enum"]):
        return f"expected one of {', '.join(map(repr, schema['enum']))}, found {_shown(value)}"
    if isinstance(value, int | float) and not isinstance(value, bool) and value < schema.get("minimum", value):
        return f"expected at least {schema['minimum']}, found {value}"
    if isinstance(value, list):
        low, high = schema.get("minItems", 0), schema.get("maxItems", len(value))
        if not low <= len(value) <= high:
            return f"expected {low} items, found {len(value)}"
    return ""


def _is(value: object, kind: str) -> bool:
    """JSON's types: true is no number, and 1.0 is an integer."""
    if kind == "integer":
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _equal(value: object, expected: object) -> bool:
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
