"""A Hugging Face folder as a source: ``config.json``, the safetensors and their headers, and what is refused at once.

Tensors are read in pieces by their offsets, so that no file is ever in memory as a whole. Nothing outside the folder
is named by an index, and nothing that may run code is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from crt_export.checkpoint import find_weight_files
from crt_export.config import read_config_file
from crt_export.errors import CheckpointError, UnsupportedError, problem_list
from crt_export.strict_json import json_problem, parse_json
from crt_export.user_files import is_input, open_input, read_input

#: Safetensors dtype to PyTorch dtype; no other kind holds weights that can be converted.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_HEADER_BYTES = 100_000_000
_PIECE = 1 << 24
_MOST_JSON_BYTES = 1 << 26
_PICKLE = re.compile(r"pytorch_model(-[0-9]+-of-[0-9]+)?\.(bin|pt|pth)|.*\.(pt|pth|ckpt|pkl)|consolidated.*")
_PICKLE_ADVICE = """pickled weights may run code and are never loaded; convert them where you trust them:
    tensors = torch.load({name!r}, map_location="cpu", weights_only=True)
    tensors = {{name: tensor.contiguous().clone() for name, tensor in tensors.items()}}
    safetensors.torch.save_file(tensors, "model.safetensors")"""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        shape: Its dims.
        dtype: Of its values.
        file: File that holds it.
        offset: Of its first byte.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int = 0


class Source(Protocol):
    """What is converted."""

    @property
    def path(self) -> Path:
        """The folder or the file."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """``config.json`` of the folder, or one made of what the file says."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by its name."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored."""
        ...

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal, dtype and all."""
        ...

    def document(self, name: str) -> dict[str, Any] | None:
        """A JSON object beside the weights; None where that file is not there."""
        ...

    def content(self, name: str) -> bytes | None:
        """Any file beside the weights; None where it is not there."""
        ...


class HuggingFaceFolder:
    """A folder that ``save_pretrained`` wrote or ``hf download`` fetched."""

    def __init__(self, path: Path) -> None:
        """Read configuration and headers.

        Raises:
            CheckpointError: Something is missing, damaged or contradicts itself.
            UnsupportedError: Adapters, quantised weights or remote code.
        """
        _refuse_adapter(path)
        self.path, self.config = path, _checked_config(path)
        self._tensors: dict[str, StoredTensor] = {}

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Headers of all shards.

        Raises:
            CheckpointError: Weights are missing or damaged.
            UnsupportedError: Tensors of another dtype.
        """
        if self._tensors:
            return self._tensors
        _refuse_pickle(self.path)
        files = find_weight_files(self.path)
        problems: list[str] = []
        for name in files.names:
            there = read_header(self.path / name)
            problems += files.place_problems(name, set(there))
            self._tensors |= there
        if problems:
            raise CheckpointError(problem_list(str(files.title), problems[:20]))
        return self._tensors

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored."""
        return read_tensor(self.tensors[name])

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal, compared piece by piece."""
        one, other = self.tensors[first], self.tensors[second]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        size = _bytes(one)
        with open_input(one.file) as a, open_input(other.file) as b:
            a.seek(one.offset)
            b.seek(other.offset)
            steps = [min(_PIECE, size - done) for done in range(0, size, _PIECE)]
            return all(a.read(step) == b.read(step) for step in steps)

    def document(self, name: str) -> dict[str, Any] | None:
        """A JSON object beside the weights."""
        content = self.content(name)
        return None if content is None else json_object(self.path / name, content)

    def content(self, name: str) -> bytes | None:
        """Any file beside the weights."""
        try:
            return read_input(self.path / name, most=_MOST_JSON_BYTES) if is_input(self.path / name) else None
        except OSError as error:
            raise CheckpointError(f"{self.path / name}: cannot be read ({error.strerror})") from None


def json_object(file: Path, content: bytes) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: There is none.
    """
    try:
        value = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected a JSON object, but it {json_problem(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file; its size must be what its header says, to the byte.

    Raises:
        CheckpointError: It is damaged or cut off.
        UnsupportedError: A tensor has a dtype that no weight has.
    """
    damaged = f"{file}: expected a complete safetensors file"
    try:
        with open_input(file) as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise CheckpointError(f"{damaged}, found a header of {length:,} bytes in {size:,}; copy it again")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{damaged}, found a header that is not JSON; copy it again") from None
    entries = header.items() if isinstance(header, dict) else ()
    try:
        found = {name: _entry(file, 8 + length, value) for name, value in entries if name != "__metadata__"}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{damaged}, found a header that describes no tensors; copy it again") from None
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda tensor: tensor.offset):
        if tensor.offset != end:
            raise CheckpointError(f"{damaged}, found tensors that overlap or leave holes; copy it again")
        end += _bytes(tensor)
    if end != size:
        what = "it is cut off" if size < end else "something follows the last tensor"
        raise CheckpointError(f"{damaged} of {end:,} bytes, found {size:,}: {what}; copy it again")
    return found


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """The values of a tensor, in the dtype they are stored in.

    Raises:
        CheckpointError: The file changed while it was read.
    """
    content = bytearray(_bytes(stored))
    try:
        with open_input(stored.file) as stream:
            stream.seek(stored.offset)
            read = stream.readinto(content)
    except OSError as error:
        raise CheckpointError(f"{stored.file}: cannot be read ({error.strerror})") from None
    if read != len(content):
        raise CheckpointError(f"{stored.file}: changed while it was read")
    return torch.frombuffer(content, dtype=stored.dtype).reshape(stored.shape)


def _entry(file: Path, start: int, value: Mapping[str, Any]) -> StoredTensor:
    shape = tuple(value["shape"])
    begin, end = value["data_offsets"]
    if not all(type(one) is int for one in (*shape, begin, end)) or not all(dim > 0 for dim in shape) or len(shape) > 8:
        # causal masks and other non-weights have up to 4 dims; empty tensors are no weights
        raise ValueError
    dtype = DTYPES.get(value["dtype"]) or _OTHER_DTYPES.get(value["dtype"])
    if dtype is None:
        raise UnsupportedError(
            f"{file}: holds tensors of dtype {value['dtype']!s:.20}, expected F32, F16 or BF16; quantised "
            "weights are not converted: take the model that they were made from"
        )
    tensor = StoredTensor(shape=shape, dtype=dtype, file=file, offset=start + begin)
    if end - begin != _bytes(tensor):
        raise ValueError
    return tensor


#: Of masks and counters that are no weights; a weight of one of them is refused by its name.
_OTHER_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F64": torch.float64,
}


def _bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _refuse_adapter(path: Path) -> None:
    if is_input(path / "adapter_config.json"):
        raise UnsupportedError(
            f"{path}: holds an adapter (adapter_config.json), which is only half a model; merge it into its base model "
            "first: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder)"
        )


def _refuse_pickle(path: Path) -> None:
    names = sorted(entry.name for entry in path.iterdir())
    pickled = [name for name in names if _PICKLE.fullmatch(name)]
    if pickled and not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        raise CheckpointError(
            f"{path}: holds {pickled[0]} and no safetensors; " + _PICKLE_ADVICE.format(name=pickled[0])
        )


def _checked_config(path: Path) -> dict[str, Any]:
    """``config.json``, less what no conversion can go on with."""
    config = read_config_file(path)
    if config.get("quantization_config") is not None:
        found = config["quantization_config"]
        method = found.get("quant_method", "unnamed") if isinstance(found, dict) else found
        raise UnsupportedError(
            f"{path}: its weights are quantised (quantization_config, method {method!s:.40}); take the model that they "
            "were made from, this package quantises by itself"
        )
    if config.get("auto_map") is not None:
        raise UnsupportedError(
            f"{path}: it comes with code of its own (auto_map in config.json), which is never run and may compute "
            "anything; if transformers itself has this model_type and your results come without trust_remote_code, "
            "remove auto_map from a copy of config.json"
        )
    return config
