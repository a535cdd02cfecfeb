"""Faults that are planted into the package, to show that the fuzzer finds them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any


def plant_fault(name: str) -> None:
    """Change the running package; the empty name changes nothing."""
    if name:
        FAULTS[name]()


def _let_value_errors_out() -> None:
    """The manifest's reader parses as json.loads() does, and lets its errors out."""
    import json

    from crt_export.bundle import manifest

    def parse(path: Any, content: bytes) -> Any:
        return json.loads(content)

    manifest.__dict__["_parse"] = parse


def _skip_the_checksum() -> None:
    """A snapshot's checksum is not compared, which C++ still does."""
    from crt_export.runtime import tensor_file

    tensor_file.__dict__["_refuse_other_digest"] = lambda file, digest, expected: None


def _crash() -> None:
    """The process ends without an answer where a manifest breaks the schema."""
    _on_problems(os.abort)


def _hang() -> None:
    """The process never answers where a manifest breaks the schema."""
    _on_problems(lambda: time.sleep(10_000))


def _on_problems(action: Callable[[], object]) -> None:
    from crt_export.bundle import manifest

    problems_of = manifest.manifest_problems

    def problems(document: Any) -> list[str]:
        found = problems_of(document)
        if found:
            action()
        return found

    manifest.__dict__["manifest_problems"] = problems


FAULTS = {
    "value-error": _let_value_errors_out,
    "no-checksum": _skip_the_checksum,
    "crash": _crash,
    "hang": _hang,
}
