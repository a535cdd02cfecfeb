"""A checkpoint folder, validated as a whole: ``config.json`` and ``model.safetensors``, or its shards by an index.

``save_pretrained`` and ``accelerate`` split large checkpoints::

    model.safetensors.index.json    {"metadata": {...}, "weight_map": {"<tensor>": "<file>", ...}}
    model-00001-of-00002.safetensors, ...

Links are followed, as the folders of download caches consist of them; nothing else but regular files is opened. Other
kinds of weights are named in the message, never loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crt_export.config import ModelConfig, load_config
from crt_export.errors import CheckpointError, problem_list
from crt_export.models.registry import tensor_shapes
from crt_export.strict_json import json_problem, parse_json
from crt_export.user_files import is_input, open_input, read_input

TOKENIZER_FILE = "tokenizer.json"
_DTYPES = {"F32", "F16", "BF16"}
_CONCATENATED = ": the correction is of the sum h + x; one of their concatenation cannot be expressed by this version"
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
class Checkpoint:
    """A checkpoint that was read completely and found consistent.

    Attributes:
        path: Folder it was read from.
        config: The validated architecture.
        tensors: Every weight by checkpoint name, float32, linears as [out, in].
        stored_dtypes: Safetensors dtype names that its weights are stored in, sorted.
        sha256: Content hash over the bytes of the checkpoint's files.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, torch.Tensor]
    stored_dtypes: tuple[str, ...]
    sha256: str


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read and validate a checkpoint folder.

    Raises:
        CheckpointError: A file is missing or damaged, or tensors are missing, extra, misshapen, of a wrong dtype or
            not finite (all of them are reported at once, by name).
        UnsupportedError: The configuration asks for a feature this version lacks.
    """
    path = Path(folder)
    config = load_config(path)
    files = find_weight_files(path)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    misplaced: list[str] = []
    for name in files.names:
        found = _read_tensors(path / name)
        misplaced += files.place_problems(name, set(found.shapes))
        shapes |= found.shapes
        dtypes |= found.dtypes
        tensors |= found.tensors
    # Values are checked whatever the layout, so that one error names everything there is to mend.
    problems = [*misplaced, *_layout_problems(config, shapes, dtypes), *_value_problems(tensors)]
    if problems:
        raise CheckpointError(problem_list(f"{files.title}", problems))
    if config.tokenizer == TOKENIZER_FILE and not is_input(path / TOKENIZER_FILE):
        other = (path / TOKENIZER_FILE).exists()
        found_there = "that is no regular file" if other else "that file is missing"
        raise CheckpointError(f"{path}: config.json says tokenizer {TOKENIZER_FILE!r}, and {found_there}")
    return Checkpoint(
        path=path,
        config=config,
        tensors={name: tensors[name] for name in sorted(tensors)},
        stored_dtypes=tuple(sorted(set(dtypes.values()))),
        sha256=checkpoint_hash(path),
    )


@dataclass(frozen=True, kw_only=True)
class _StoredTensors:
    """What one file holds; ``tensors`` only those that could be a weight, float32."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    tensors: dict[str, torch.Tensor]


def _read_tensors(file: Path) -> _StoredTensors:
    try:
        with safe_open(file, framework="pt") as reader:
            slices = {name: reader.get_slice(name) for name in sorted(reader.keys())}
            dtypes = {name: str(found.get_dtype()) for name, found in slices.items()}
            shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
            # PyTorch itself fails on what no weight looks like: sizes whose product overflows, dozens of dimensions.
            readable = [
                name for name in slices if dtypes[name] in _DTYPES and len(shapes[name]) <= 2 and 0 not in shapes[name]
            ]
            tensors = {name: reader.get_tensor(name).to(torch.float32) for name in readable}
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise CheckpointError(
            f"{file}: expected a complete safetensors file, found something unreadable ({error}); copy or save it again"
        ) from None
    return _StoredTensors(shapes=shapes, dtypes=dtypes, tensors=tensors)


def checkpoint_files(folder: Path) -> tuple[str, ...]:
    """Names of the files that make up a checkpoint, in the order of its content hash.

    Raises:
        CheckpointError: Its weights cannot be told, see :func:`crt_export.checkpoint.find_weight_files`.
    """
    names = ("config.json", *find_weight_files(folder).all_names, TOKENIZER_FILE)
    return tuple(name for name in names if is_input(folder / name))


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 over name and content of the checkpoint's files, so a byte-equal copy has the same hash."""
    total = hashlib.sha256()
    for name in checkpoint_files(folder):
        with open_input(folder / name) as stream:
            total.update(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def write_checkpoint(folder: str | Path, config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write ``config.json`` and ``model.safetensors`` in the dtypes given.

    Args:
        folder: Created if absent.
        config: Architecture; must match the tensors.
        tensors: Weights by checkpoint name, linears as [out, in].

    Raises:
        CheckpointError: The tensors do not fit the configuration.
    """
    path = Path(folder)
    problems = [*_layout_problems(config, {name: tuple(t.shape) for name, t in tensors.items()}, {})]
    if problems:
        raise CheckpointError(problem_list(f"{path}", problems))
    path.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in config.to_dict().items() if value is not None}
    (path / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS_FILE)
    # safetensors makes the file readable by its owner alone
    (path / WEIGHTS_FILE).chmod((path / "config.json").stat().st_mode & 0o777)
    return path


def copy_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the checkpoint's files byte for byte, so that :func:`checkpoint_hash` is preserved."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in checkpoint_files(checkpoint.path):
        shutil.copyfile(checkpoint.path / name, folder / name)


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy ``tokenizer.json``, if the model has one."""
    if checkpoint.config.tokenizer == TOKENIZER_FILE:
        shutil.copyfile(checkpoint.path / TOKENIZER_FILE, folder / TOKENIZER_FILE)


def _layout_problems(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> Iterator[str]:
    expected = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in shapes:
            yield f"missing tensor {name} {list(shape)}"
        elif shapes[name] != shape:
            concatenated = name == "correction.up.weight" and shapes[name] == (shape[0], 2 * shape[1])
            reason = _CONCATENATED if concatenated else ""
            yield f"tensor {name} has shape {list(shapes[name])}, config.json asks for {list(shape)}{reason}"
    for name in sorted(set(shapes) - set(expected)):
        tied = " (tie_word_embeddings is true: a tied head has no weights of its own)" if "lm_head" in name else ""
        yield f"unexpected tensor {name} {list(shapes[name])}{tied}"
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            yield f"tensor {name} has dtype {dtype}, expected one of {', '.join(sorted(_DTYPES))}"


def _value_problems(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            yield f"tensor {name} has {bad} of {tensor.numel()} values that are NaN or infinite"


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
