"""``config.json`` of a checkpoint: every key checked, every problem reported at once.

Imports neither torch nor onnx: the runtime reads the same class from a bundle's manifest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from crt_export.errors import CheckpointError, UnsupportedError, problem_list

FORMAT_VERSION = 1
RECURRENT = "context_ready_transformer"
PLAIN = "transformer"
TOKENIZERS = ("byte", "tokenizer.json", "none")
ROPE_LAYOUTS = ("interleaved", "half")
BYTE_VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of one checkpoint. Sizes are counts; ``rope_theta`` is the rotary base.

    ``training_sequence_length`` is the context length the model was trained at (None: not known);
    ``unroll_steps`` is the K the model was trained for and the default K of its prefill.

    Raises:
        CheckpointError: A value has the wrong type, is out of range or contradicts another.
        UnsupportedError: A value is valid in the format and not implemented by this version.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float
    rope_theta: float
    rope_layout: str
    tie_word_embeddings: bool
    tokenizer: str
    correction_intermediate_size: int | None = None
    unroll_steps: int = 1
    format_version: int = FORMAT_VERSION
    head_dim: int = 0
    num_key_value_heads: int = 0
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    training_sequence_length: int | None = None

    def __post_init__(self) -> None:
        """Fill derived defaults, then check types, ranges and support."""
        problems = [*_type_problems(self)]
        if not problems:
            self._derive_head_sizes()
            problems = [*_range_problems(self)]
        if problems:
            raise CheckpointError(problem_list("config.json", problems))
        unsupported = [*_unsupported(self)]
        if unsupported:
            raise UnsupportedError(problem_list("config.json asks for what this version cannot do", unsupported))

    def _derive_head_sizes(self) -> None:
        if self.head_dim == 0 and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_key_value_heads == 0:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)

    @property
    def recurrent(self) -> bool:
        """True for a CRT (correction FFN and recurrent state), False for a plain transformer."""
        return self.model_type == RECURRENT

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Check the keys and build the configuration.

        Raises:
            CheckpointError: Unknown or missing keys, or what the class itself raises.
        """
        known = {field.name: field for field in fields(cls)}
        required = {name for name, field in known.items() if field.default is MISSING}
        if values.get("model_type") == RECURRENT:
            required |= {"correction_intermediate_size", "unroll_steps"}
        problems = [
            f"unknown key {key!r}; known keys: {', '.join(sorted(known))}" for key in values if key not in known
        ]
        problems += [f"missing key {key!r}" for key in sorted(required - set(values))]
        if problems:
            raise CheckpointError(problem_list("config.json", problems))
        derived = ("head_dim", "num_key_value_heads")
        given = {k: v for k, v in values.items() if not (k in derived and v is None)}
        zeros = [f"{k} must be at least 1, found {given[k]!r}" for k in derived if k in given and given[k] == 0]
        if zeros:
            raise CheckpointError(problem_list("config.json", zeros))
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Every key with its resolved value, ready for JSON."""
        return asdict(self)

    @property
    def parameter_count(self) -> int:
        """Number of trained weights (architecture.md, "Published sizes", for any F and G; tied head counted once)."""
        c, v, f, g = (
            self.hidden_size,
            self.vocab_size,
            self.intermediate_size,
            self.correction_intermediate_size or 0,
        )
        layer = 4 * (c * c + c) + 2 * c * f + f + c + 4 * c
        head = 0 if self.tie_word_embeddings else v * c + v
        correction = 2 * c * g + g + c + 2 * c if self.recurrent else 0
        return v * c + self.num_hidden_layers * layer + correction + 2 * c + head


def load_config(folder: str | Path) -> ModelConfig:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: The folder or file is missing, not JSON, or its values are unusable.
        UnsupportedError: It asks for a feature this version lacks.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: expected a checkpoint folder with config.json and model.safetensors, "
            f"found {'a file' if path.exists() else 'nothing'}"
        )
    file = path / "config.json"
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: missing; a checkpoint is a folder with config.json and model.safetensors"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected a JSON object, found something unreadable ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}")
    try:
        return ModelConfig.from_dict(values)
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None


_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "unroll_steps",
    "format_version",
    "head_dim",
    "num_key_value_heads",
)
_OPTIONAL_INTEGERS = (
    "correction_intermediate_size",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "training_sequence_length",
)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type_problems(config: ModelConfig):
    for name in (*_INTEGERS, *_OPTIONAL_INTEGERS):
        value = getattr(config, name)
        if not _is_integer(value) and not (value is None and name in _OPTIONAL_INTEGERS):
            yield f"{name} must be an integer, found {value!r}"
    for name in ("layer_norm_eps", "rope_theta"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            yield f"{name} must be a finite number, found {value!r}"
    if not isinstance(config.tie_word_embeddings, bool):
        yield f"tie_word_embeddings must be true or false, found {config.tie_word_embeddings!r}"
    for name, allowed in (
        ("model_type", (RECURRENT, PLAIN)),
        ("rope_layout", ROPE_LAYOUTS),
        ("tokenizer", TOKENIZERS),
    ):
        if getattr(config, name) not in allowed:
            yield f"{name} must be one of {', '.join(allowed)}, found {getattr(config, name)!r}"


def _range_problems(config: ModelConfig):
    positive = [name for name in _INTEGERS if name != "format_version"]
    positive += ["training_sequence_length", "sliding_window", "layer_norm_eps", "rope_theta"]
    if config.recurrent:
        positive.append("correction_intermediate_size")
    for name in positive:
        value = getattr(config, name)
        if value is None and name != "correction_intermediate_size":
            continue
        if value is None or value <= 0:
            yield f"{name} must be greater than 0, found {value!r}"
    if config.num_attention_heads > 0 and config.hidden_size % config.num_attention_heads:
        yield f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
    if config.head_dim % 2:
        yield f"head_dim must be even for rotary embedding, found {config.head_dim}"
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < config.vocab_size:
            yield f"{name} must be in [0, vocab_size = {config.vocab_size}), found {value}"
    if config.tokenizer == "byte" and config.vocab_size < BYTE_VOCABULARY:
        yield f"the byte tokenizer needs vocab_size >= {BYTE_VOCABULARY}, found {config.vocab_size}"
    trained = config.training_sequence_length
    if trained is not None and trained > config.max_position_embeddings:
        yield f"training_sequence_length {trained} is above max_position_embeddings {config.max_position_embeddings}"


def _unsupported(config: ModelConfig):
    if config.format_version != FORMAT_VERSION:
        yield f"format_version {config.format_version} (this version reads {FORMAT_VERSION}; upgrade crt-export)"
    if config.num_key_value_heads != config.num_attention_heads:
        yield f"num_key_value_heads {config.num_key_value_heads} different from num_attention_heads (grouped queries)"
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        yield f"head_dim {config.head_dim} x {config.num_attention_heads} heads different from hidden_size"
    if config.sliding_window is not None:
        yield f"sliding_window {config.sliding_window}"
