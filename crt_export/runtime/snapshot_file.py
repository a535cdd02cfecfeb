"""Snapshots as safetensors files; :mod:`crt_export.runtime.snapshot` describes what is in them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crt_export.errors import BundleError, CrtExportError, InputError
from crt_export.input_file import is_input, kind_of
from crt_export.output_file import write_file
from crt_export.runtime.counts import shown
from crt_export.runtime.history import RECENT_TOKENS
from crt_export.runtime.tensor_file import TensorFileKind, read_tensor_file, tensor_file_bytes

#: Dtypes and dims of a session's tensors; equal names are equal sizes, whatever session it is.
_ROW = (("int64",), ("batch",))
_OF_TOKENS = ("batch", "vocab")
_FORMS: dict[str, tuple[tuple[str, ...], tuple[str | int, ...]]] = {
    **dict.fromkeys(("position", "next_tokens", "drawn", "pending", "held"), _ROW),
    "recent": (("int64",), ("batch", RECENT_TOKENS)),
    "logits": (("float32",), _OF_TOKENS),
    "seen": (("uint8",), _OF_TOKENS),
    "state": (("float32",), ("batch", 1, "hidden")),
}
_CACHE = (("float32", "float16"), ("batch", "heads", "tokens", "head_dim"))
_CACHE_NAME = re.compile(r"past_key_values\.[0-9]+\.(key|value)")


def _form_problems(forms: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """What no session has; whether this session has it, check_snapshot() finds out."""
    problems = []
    sizes: dict[str | int, int] = {}
    for name, (dtype, shape) in forms.items():
        dtypes, dims = _CACHE if _CACHE_NAME.fullmatch(name) else _FORMS.get(name, ((), ()))
        known = [
            sizes.setdefault(dim, dim if isinstance(dim, int) else size) for dim, size in zip(dims, shape, strict=False)
        ]
        if not dims:
            problems.append(f"{name!r:.80} is unknown")
        elif dtype not in dtypes or len(shape) != len(dims) or known != list(shape):
            wanted = ", ".join(str(sizes.get(dim, dim)) for dim in dims)
            problems.append(f"{name} must be {' or '.join(dtypes)} [{wanted}], found {dtype} {list(shape)}")
    return problems


SNAPSHOT = TensorFileKind(
    format="crt-export snapshot",
    version=1,
    title="a snapshot",
    required=("bundle", "target"),
    problems=_form_problems,
)


def save_snapshot(path: str | os.PathLike[str], bundle: str, target: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a file in one step, as :func:`crt_export.output_file.write_file` does: a link stays, its target is new.

    Raises:
        InputError: It cannot be written; what was at ``path`` is unchanged.
    """
    final = _checked_path(path, InputError)
    if "\0" in str(final):
        raise InputError(f"cannot write the snapshot {str(final)!r}: a path must not hold a NUL byte")
    if not final.name:  # "", "." or "/"
        raise InputError(f"expected a file name to write the snapshot to, such as 'chat.snapshot', found {shown(path)}")
    content = tensor_file_bytes(SNAPSHOT, {"bundle": bundle, "target": target}, tensors)
    try:
        write_file(final, content)
    except OSError as error:
        raise InputError(f"cannot write the snapshot {final}: {error.strerror or error}") from error


def load_snapshot(path: str | os.PathLike[str]) -> tuple[str, str, dict[str, np.ndarray]]:
    """Read a file and compare its checksum; whether a session can use it, restore() finds out.

    Returns:
        Identity of the bundle, name of the target, tensors by name.

    Raises:
        BundleError: The file is missing, damaged, no snapshot, or of a newer format version.
    """
    file = _checked_path(path, BundleError)
    if "\0" in str(file):
        raise BundleError(f"expected a snapshot file, found a path with a NUL byte: {str(file)!r}")
    if not is_input(file):
        found = kind_of(file.stat().st_mode) if file.exists() else "nothing"
        raise BundleError(f"expected a snapshot file, found {found}: {file}")
    metadata, tensors = read_tensor_file(SNAPSHOT, file)
    return metadata["bundle"], metadata["target"], tensors


def _checked_path(path: str | os.PathLike[str], kind: type[CrtExportError]) -> Path:
    try:
        found = Path(path)
        os.fsencode(found)
    except (TypeError, UnicodeError) as error:
        raise kind(f"expected the path of a snapshot file, found {shown(path)} ({error})") from error
    return found
