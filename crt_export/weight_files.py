"""The weight files of a checkpoint folder: one, or several shards that an index names tensor by tensor.

``save_pretrained`` and ``accelerate`` split large checkpoints::

    model.safetensors.index.json    {"metadata": {...}, "weight_map": {"<tensor>": "<file>", ...}}
    model-00001-of-00002.safetensors, ...

Links are followed, as the folders of download caches consist of them; nothing else but regular files is opened. Other
kinds of weights are named in the message, never loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crt_export.errors import CheckpointError, problem_list
from crt_export.strict_json import json_problem, parse_json
from crt_export.user_files import is_input, open_input, read_input

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: A line for every tensor of a model with a million of them.
_MOST_INDEX_BYTES = 2**27
_SHARD = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")
#: A file of the folder itself, under a name that every system can have.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
_SAVE = "save the weights with safetensors.torch.save_file(state_dict, ...)"
#: What other programs call their weights, and what to do about it; the first that fits is the one that is said.
_OTHER_WEIGHTS = (
    (
        re.compile(r"adapter_model\..*"),
        "is an adapter, not a model",
        "merge it into its base model (peft: merge_and_unload), then save that one as model.safetensors",
    ),
    (
        re.compile(r".*\.gguf"),
        "is a GGUF file, which may be quantised",
        "take the checkpoint that it was made from",
    ),
    (
        re.compile(r"(.*\.(bin|pt|pth|ckpt|pkl))|(pytorch_model\.bin\.index\.json)"),
        "may run code when loaded",
        f"load it where you trust it and {_SAVE}",
    ),
    (
        re.compile(r".*\.safetensors"),
        "is not called model.safetensors",
        "rename it if it holds the whole model",
    ),
    (re.compile(r".*\.(h5|msgpack|npz|onnx)"), "is of another framework", f"load it in PyTorch and {_SAVE}"),
)


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The weights of one checkpoint.

    Attributes:
        folder: The checkpoint.
        names: Files with tensors, sorted.
        index: The index of shards; None for a single file.
        shard_of: File of every tensor by the tensor's name; empty for a single file.
    """

    folder: Path
    names: tuple[str, ...]
    index: str | None = None
    shard_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_names(self) -> tuple[str, ...]:
        """The files with tensors, after their index."""
        return (*([self.index] if self.index else []), *self.names)

    @property
    def title(self) -> Path:
        """What a message about all of them names."""
        return self.folder / (self.index or self.names[0])

    def place_problems(self, name: str, tensors: set[str]) -> Iterator[str]:
        """What is wrong with the tensors that one file holds, by the index."""
        if self.index is None:
            return
        expected = {tensor for tensor, shard in self.shard_of.items() if shard == name}
        for tensor in sorted(expected - tensors):
            yield f"tensor {tensor} is not in {name}, where {self.index} puts it"
        for tensor in sorted(tensors - expected):
            right = self.shard_of.get(tensor)
            yield f"tensor {tensor} is in {name}, {self.index} " + (f"puts it into {right}" if right else "has none")


def find_weight_files(folder: Path) -> WeightFiles:
    """Find the weights and check that every file can be opened.

    Raises:
        CheckpointError: There are none, of another kind, shards that do not fit their index, or files that cannot be
            read.
    """
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if index.exists() and single.exists():
        raise CheckpointError(f"{folder}: holds both {WEIGHTS_FILE} and {INDEX_FILE}: remove what is not meant")
    if index.exists():
        shard_of = _read_index(index)
        found = WeightFiles(
            folder=folder, names=tuple(sorted(set(shard_of.values()))), index=INDEX_FILE, shard_of=shard_of
        )
        _check_shards(found)
    else:
        if not single.exists():
            raise CheckpointError(_missing(single))
        found = WeightFiles(folder=folder, names=(WEIGHTS_FILE,))
    for name in found.names:
        _check_kind(folder / name)
    return found


def _read_index(file: Path) -> dict[str, str]:
    try:
        document = parse_json(read_input(file, most=_MOST_INDEX_BYTES))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected the index of shards as JSON, but it {json_problem(error)}") from None
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f'{file}: expected {{"weight_map": {{"<tensor>": "<file>", ...}}}}; save the model again')
    bad = sorted({name for name in found.values() if not _PLAIN_NAME.fullmatch(name)})
    if bad:
        problems = [
            f"{name[:80]!r} is no name of a file in this folder, such as model-00001-of-00002.safetensors"
            for name in bad
        ]
        raise CheckpointError(problem_list(f"{file}", problems[:20]))
    return found


def _check_shards(files: WeightFiles) -> None:
    there = {entry.name for entry in files.folder.iterdir()}
    problems = [f"{name} is missing; copy all shards" for name in files.names if name not in there]
    others = sorted(name for name in there - set(files.names) if _SHARD.fullmatch(name))
    problems += [
        f"{name} is a shard that the index does not name; remove it if it is another model's" for name in others
    ]
    if problems:
        raise CheckpointError(problem_list(f"{files.title}", problems))


def _check_kind(file: Path) -> None:
    try:
        with open_input(file) as stream:
            start = stream.read(9)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); change its permissions or copy it") from None
    if start[8:] == b"{":  # safetensors: 8 bytes of a length, which may look like anything, then JSON
        return
    if start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise CheckpointError(
            f"{file}: expected safetensors, found a pickle; pickles may run code and are never loaded: "
            "load it where you trust it and save it with safetensors.torch.save_file"
        )
    if start[:4] == b"GGUF":
        raise CheckpointError(f"{file}: expected safetensors, found a GGUF file: take what it was made from")


def _missing(file: Path) -> str:
    """What is in the folder instead, and what to do."""
    names = sorted(entry.name for entry in file.parent.iterdir())
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if shards:
        return (
            f"{file}: missing, and so is {INDEX_FILE}, found shards only ({_shown(shards)}): copy their index from "
            "where the model was saved, it says which tensors there have to be"
        )
    for pattern, what, advice in _OTHER_WEIGHTS:
        found = [name for name in names if pattern.fullmatch(name) and is_input(file.parent / name)]
        if found:
            return f"{file}: missing, found only {_shown(found)}, which {what}; {advice}"
    return f"{file}: missing, found no weights; {_SAVE}"


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
