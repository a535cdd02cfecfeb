"""``config.json`` + ``model.safetensors`` -> :class:`Checkpoint`, validated as a whole."""

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

WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
#: What makes up a checkpoint, in the order of its content hash.
CHECKPOINT_FILES = ("config.json", WEIGHTS_FILE, TOKENIZER_FILE)
_DTYPES = {"F32", "F16", "BF16"}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read completely and found consistent.

    Attributes:
        path: Folder it was read from.
        config: The validated architecture.
        tensors: Every weight by checkpoint name, float32, linears as [out, in].
        stored_dtypes: Safetensors dtype names the file used, sorted.
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
    file = path / WEIGHTS_FILE
    _require_weights_file(file)
    try:
        with safe_open(file, framework="pt") as reader:
            dtypes = {name: reader.get_slice(name).get_dtype() for name in reader.keys()}
            shapes = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}
            # Values are checked whatever the layout, so that one error names everything there is to mend.
            tensors = {
                name: reader.get_tensor(name).to(torch.float32) for name in sorted(shapes) if dtypes[name] in _DTYPES
            }
        problems = [*_layout_problems(config, shapes, dtypes), *_value_problems(tensors)]
    except (SafetensorError, OSError, MemoryError) as error:  # a file of a terabyte of nothing cannot be mapped
        raise CheckpointError(
            f"{file}: expected a complete safetensors file, found something unreadable ({error}); copy or save it again"
        ) from None
    if problems:
        raise CheckpointError(problem_list(f"{file}", problems))
    if config.tokenizer == "tokenizer.json" and not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path}: config.json says tokenizer 'tokenizer.json', and that file is missing")
    return Checkpoint(
        path=path,
        config=config,
        tensors=tensors,
        stored_dtypes=tuple(sorted(set(dtypes.values()))),
        sha256=checkpoint_hash(path),
    )


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 over name and content of the checkpoint's files, so a byte-equal copy has the same hash."""
    total = hashlib.sha256()
    for name in CHECKPOINT_FILES:
        file = folder / name
        if file.is_file():
            with file.open("rb") as stream:
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
    for name in CHECKPOINT_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, folder / name)


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy ``tokenizer.json``, if the model has one."""
    if checkpoint.config.tokenizer == TOKENIZER_FILE:
        shutil.copyfile(checkpoint.path / TOKENIZER_FILE, folder / TOKENIZER_FILE)


def _require_weights_file(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            start = stream.read(2)
    except (FileNotFoundError, IsADirectoryError):
        pickles = [entry.name for entry in sorted(file.parent.iterdir()) if entry.suffix in _PICKLE_SUFFIXES]
        found = f"only {', '.join(pickles)}, which may run code when loaded" if pickles else "no weights"
        raise CheckpointError(
            f"{file}: missing, found {found}; save the weights with safetensors.torch.save_file(state_dict, ...)"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); change its permissions or copy it") from None
    if start == b"PK" or (start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise CheckpointError(
            f"{file}: expected safetensors, found a pickle; pickles may run code and are never loaded: "
            "load it where you trust it and save it with safetensors.torch.save_file"
        )


def _layout_problems(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> Iterator[str]:
    expected = tensor_shapes(config)
    for name, shape in expected.items():
        if name not in shapes:
            yield f"missing tensor {name} {list(shape)}"
        elif shapes[name] != shape:
            yield f"tensor {name} has shape {list(shapes[name])}, config.json asks for {list(shape)}"
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
