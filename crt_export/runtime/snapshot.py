"""Everything a session holds, to go on from later: in memory, or in a file that Python and C++ read alike.

The file is safetensors. Its metadata (strings) are ``format`` ("crt-export snapshot"), ``format_version`` ("1"),
``bundle`` (the bundle's identity: SHA-256 of its manifest.json, hex), ``target``, and ``sha256`` over the
little-endian bytes of all tensors in order of their sorted names. Its tensors, and no others:

===================================  =============================  ================================================
``position``                         int64 [batch]                  tokens in the cache of each row
``next_tokens``                      int64 [batch]                  argmax after each row's last token, -1 none
``logits``                           float32 [batch, vocab]         after each row's last token, NaN at position 0
``drawn``                            int64 [batch]                  random draws so far: the counter of the next one
``pending``                          int64 [batch]                  token drawn and not yet fed, -1 none
``seen``                             uint8 [batch, vocab]           1 for tokens the repetition penalty is about
``recent``                           int64 [batch, 1024]            last tokens fed, newest at the end, -1 where there
                                                                    is none or a stop token ended the text
``held``                             int64 [batch]                  characters of the text not given out, because they
                                                                    may become a stop string
``state``                            float32 [batch, 1, hidden]     recurrent state; not for a plain transformer
``past_key_values.{i}.key|value``    float32 or float16             cache [batch, heads, length, head_dim];
                                                                    length is the largest position, and entries at
                                                                    and beyond a row's own position are zero
===================================  =============================  ================================================
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from crt_export.errors import BundleError, InputError, problem_list
from crt_export.runtime.counts import shown
from crt_export.runtime.history import RECENT_TOKENS
from crt_export.runtime.sizes import TensorSizes
from crt_export.text_stream import TEXT_END

#: A session that goes on counts further, and the count must never overflow an int64.
MOST_DRAWS = 2**62


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a session held. Made by ``session.snapshot()``; only a session of the same kind takes it back.

    Attributes:
        bundle: Identity of the bundle.
        target: Name of the target.
        tensors: Name to values, see the module.

    Raises:
        InputError: An attribute is of another type.
    """

    bundle: str
    target: str
    tensors: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        """Check the types; what the values are worth, restore() finds out."""
        problems = [
            f"{name} must be text, found {shown(value)}"
            for name, value in (("bundle", self.bundle), ("target", self.target))
            if not isinstance(value, str)
        ]
        if not isinstance(self.tensors, Mapping):
            problems.append(f"tensors must map names to arrays, found {shown(self.tensors)}")
        if problems:
            raise InputError(problem_list("snapshot; take it with session.snapshot() or Snapshot.load()", problems))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; a file that is there is replaced in one step, or stays as it was.

        Raises:
            InputError: It cannot be written.
        """
        from crt_export.runtime.snapshot_file import save_snapshot

        save_snapshot(path, self.bundle, self.target, self.tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Read a file.

        Raises:
            BundleError: It is missing, damaged, no snapshot, or of a newer format version.
        """
        from crt_export.runtime.snapshot_file import load_snapshot

        bundle, target, tensors = load_snapshot(path)
        return cls(bundle=bundle, target=target, tensors=tensors)


def check_snapshot(snapshot: Snapshot, *, bundle: str, target: str, sizes: TensorSizes) -> None:
    """Refuse a snapshot that a session cannot go on from.

    Args:
        snapshot: The snapshot; nothing of it is trusted.
        bundle: Identity of the session's bundle.
        target: The session's target.
        sizes: The session's sizes.

    Raises:
        BundleError: No snapshot, another bundle, target or batch, tensors missing, unknown or of another dtype or
            shape, more tokens than the session's capacity, or values that no session holds. Lists every problem of
            a kind.
    """
    if not isinstance(snapshot, Snapshot):
        raise BundleError(
            f"expected a snapshot of session.snapshot() or Snapshot.load() to restore, found {shown(snapshot)}"
        )
    problems = [*_origin_problems(snapshot, bundle, target)]
    problems = problems or [*_shape_problems(snapshot.tensors, sizes)] or [*_value_problems(snapshot.tensors, sizes)]
    if problems:
        raise BundleError(problem_list("this session cannot restore the snapshot", problems))


def _origin_problems(snapshot: Snapshot, bundle: str, target: str) -> Iterator[str]:
    if snapshot.bundle != bundle:
        yield (
            f"it was taken with the bundle {snapshot.bundle:.16}, this one is {bundle:.16} (SHA-256 of manifest.json): "
            "open the bundle it was taken with"
        )
    if snapshot.target != target:
        yield f"it was taken on target {snapshot.target!r}, this session runs on {target!r}"


def _shape_problems(tensors: Mapping[str, np.ndarray], sizes: TensorSizes) -> Iterator[str]:
    position = tensors.get("position")
    if not isinstance(position, np.ndarray) or position.dtype != np.int64 or position.ndim != 1:
        yield "position must be int64 [batch]"
        return
    if position.size != sizes.batch:
        yield f"it holds {position.size} rows, this session has a batch of {sizes.batch}"
        return
    outside = np.flatnonzero((position < 0) | (position > sizes.capacity)).tolist()
    if outside:
        for row in outside:
            yield f"row {row} holds {position[row]} tokens, this session has a capacity of {sizes.capacity}"
        return
    expected = _expected(sizes, int(position.max()))
    yield from (f"{name} is missing" for name in expected if name not in tensors)
    yield from (f"{name} is unknown" for name in tensors if name not in expected)
    for name, (dtype, shape) in expected.items():
        found = tensors.get(name)
        if found is None:
            continue
        if not isinstance(found, np.ndarray):
            yield f"{name} must be an array, found {type(found).__name__}"
        elif found.dtype != dtype or found.shape != shape:
            yield f"{name} must be {dtype} {list(shape)}, found {found.dtype} {list(found.shape)}"


def _expected(sizes: TensorSizes, length: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    batch, vocab = sizes.batch, sizes.vocab
    cache = (batch, sizes.heads, length, sizes.head_dim)
    return {
        **dict.fromkeys(("position", "next_tokens", "drawn", "pending", "held"), ("int64", (batch,))),
        "recent": ("int64", (batch, RECENT_TOKENS)),
        "logits": ("float32", (batch, vocab)),
        "seen": ("uint8", (batch, vocab)),
        **({"state": ("float32", (batch, 1, sizes.hidden))} if sizes.recurrent else {}),
        **{
            f"past_key_values.{layer}.{kind}": (sizes.cache_dtype, cache)
            for layer in range(sizes.layers)
            for kind in ("key", "value")
        },
    }


def _value_problems(tensors: Mapping[str, np.ndarray], sizes: TensorSizes) -> Iterator[str]:
    position, vocab = tensors["position"], sizes.vocab
    for row, count in enumerate(position.tolist()):
        for name, values in tensors.items():
            of_row = values[row, :, :count] if name.startswith("past_key_values.") else values[row]
            if count and values.dtype.kind == "f" and not np.isfinite(of_row).all():
                yield f"row {row}: {name} is not finite"
        pending, following, drawn = (int(tensors[name][row]) for name in ("pending", "next_tokens", "drawn"))
        if not -1 <= pending < vocab:
            yield f"row {row}: the pending token {pending} is outside the vocabulary (0 to {vocab - 1}, -1 for none)"
        if count and not 0 <= following < vocab:
            yield f"row {row}: the next token {following} is outside the vocabulary (0 to {vocab - 1})"
        if not 0 <= drawn <= MOST_DRAWS:
            yield f"row {row}: {drawn} random draws, must be 0 to {MOST_DRAWS}"
        if tensors["seen"][row].max() > 1:
            yield f"row {row}: seen must be 0 or 1"
        recent, held = tensors["recent"][row], int(tensors["held"][row])
        if recent.min() < TEXT_END or recent.max() >= vocab:
            yield f"row {row}: a recent token is outside the vocabulary (0 to {vocab - 1}, -1 for none)"
        if held < 0:
            yield f"row {row}: {held} characters held back, must be at least 0"
