"""``config.json`` + ``model.safetensors``, or its shards -> :class:`Checkpoint`, validated as a whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crt_export.config import ModelConfig, load_config
from crt_export.errors import CheckpointError, problem_list
from crt_export.user_files import is_input, open_input
from crt_export.weight_files import WEIGHTS_FILE, find_weight_files

TOKENIZER_FILE = "tokenizer.json"
_DTYPES = {"F32", "F16", "BF16"}
_CONCATENATED = ": the correction is of the sum h + x; one of their concatenation cannot be expressed by this version"


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


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor ``model.safetensors`` must hold, linears as [out, in]."""
    c, v, f = config.hidden_size, config.vocab_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (v, c)}

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (c,)

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    if config.recurrent:
        g = config.correction_intermediate_size or 0
        norm("correction.norm")
        linear("correction.up", g, c)
        linear("correction.down", c, g)
    for i in range(config.num_hidden_layers):
        norm(f"layers.{i}.attn_norm")
        for projection in "qkvo":
            linear(f"layers.{i}.attn.{projection}", c, c)
        norm(f"layers.{i}.mlp_norm")
        linear(f"layers.{i}.mlp.up", f, c)
        linear(f"layers.{i}.mlp.down", c, f)
    norm("final_norm")
    if not config.tie_word_embeddings:
        linear("lm_head", v, c)
    return shapes


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
        CheckpointError: Its weights cannot be told, see :func:`crt_export.weight_files.find_weight_files`.
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
