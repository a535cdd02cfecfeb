"""``config.json`` of a checkpoint: every key checked, every problem reported at once.

Imports neither torch nor onnx: the runtime reads the same class from a bundle's manifest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from crt_export.errors import CheckpointError, UnsupportedError, problem_list
from crt_export.strict_json import json_problem, parse_unique_keys
from crt_export.user_files import read_input

FORMAT_VERSION = 1
RECURRENT = "context_ready_transformer"
PLAIN = "transformer"
TOKENIZERS = ("byte", "tokenizer.json", "none")
ROPE_LAYOUTS = ("interleaved", "half")
BYTE_VOCABULARY = 256
#: The rotary tables of every graph hold one row per position: 2**20 rows are half a GiB at a head_dim of 128.
MOST_POSITIONS = 2**20
#: Every layer is written once per pass into the unrolled prefill.
MOST_LAYERS = MOST_PASSES = 4096
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of one checkpoint. Sizes are counts; ``rope_theta`` is the rotary base.

    ``training_sequence_length`` is the context length the model was trained at (None: not known);
    ``unroll_steps`` is the K the model was trained for and the default K of its prefill;
    ``sliding_window`` is the number of latest tokens that attention sees, the token itself included (None: all).
    Every sequence begins with ``bos_token_id``, once (None: the model was trained without); ``eos_token_id`` ends one,
    any of them where there are several.

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
    eos_token_id: int | tuple[int, ...] | None = None
    training_sequence_length: int | None = None

    def __post_init__(self) -> None:
        """Fill derived defaults, then check types, ranges and support."""
        problems = _value_problems(asdict(self))
        if problems:
            raise CheckpointError(problem_list("config.json", problems))
        if isinstance(self.eos_token_id, list | tuple):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        self._derive_head_sizes()
        unsupported = [*_unsupported(self)]
        if unsupported:
            raise UnsupportedError(problem_list("config.json asks for what this version cannot do", unsupported))

    def _derive_head_sizes(self) -> None:
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_key_value_heads == 0:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)

    @property
    def recurrent(self) -> bool:
        """True for a CRT (correction FFN and recurrent state), False for a plain transformer."""
        return self.model_type == RECURRENT

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a sequence, as a tuple, empty where there is none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """What begins or ends a sequence."""
        return frozenset(self.eos_token_ids) | ({self.bos_token_id} if self.bos_token_id is not None else set())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Check the keys and build the configuration.

        Raises:
            CheckpointError: Unknown or missing keys and impossible values of the others, all at once.
            UnsupportedError: A value is valid in the format and not implemented by this version.
        """
        known = {field.name: field for field in fields(cls)}
        required = {name for name, field in known.items() if field.default is MISSING}
        if values.get("model_type") == RECURRENT:
            required |= {"correction_intermediate_size", "unroll_steps"}
        problems = [
            f"unknown key {key!r}; known keys: {', '.join(sorted(known))}" for key in values if key not in known
        ]
        problems += [f"missing key {key!r}" for key in sorted(required - set(values))]
        given = {key: value for key, value in values.items() if key in known}
        given = {key: value for key, value in given.items() if not (key in _DERIVED and value is None)}
        # In a file 0 is a value like any other; in the class it asks for the derived one.
        problems += [f"{key} must be at least 1, found 0" for key in _DERIVED if _is_integer_zero(given.get(key))]
        problems += _value_problems(given)
        if problems:
            raise CheckpointError(problem_list("config.json", problems))
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Every key with its resolved value, ready for JSON."""
        return asdict(self)

    @property
    def parameter_count(self) -> int:
        """Number of trained weights of any size; a tied head counts once."""
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
    file = path / "config.json"
    try:
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: expected a checkpoint folder with config.json and model.safetensors, "
                f"found {'a file' if path.exists() else 'nothing'}"
            )
        values = parse_unique_keys(read_input(file, most=_MOST_BYTES))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: missing; a checkpoint is a folder with config.json and model.safetensors"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: expected a JSON object, found something unreadable: it {json_problem(error)}"
        ) from None
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
    "training_sequence_length",
)


_CHOICES = {"model_type": (RECURRENT, PLAIN), "rope_layout": ROPE_LAYOUTS, "tokenizer": TOKENIZERS}
_POSITIVE = (
    *(name for name in _INTEGERS if name != "format_version"),
    "training_sequence_length",
    "sliding_window",
    "layer_norm_eps",
    "rope_theta",
)
_DERIVED = ("head_dim", "num_key_value_heads")
_MINIMA = {"vocab_size": 2}  # one token leaves nothing to predict
_MAXIMA = {"max_position_embeddings": MOST_POSITIONS, "num_hidden_layers": MOST_LAYERS, "unroll_steps": MOST_PASSES}


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_integers(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_integer, value))


def _is_integer_zero(value: object) -> bool:
    return _is_integer(value) and value == 0


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _value_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values that are there: types first, then the ranges of those of the right type."""
    wrong_type = _type_problems(values)
    sound = {name: value for name, value in values.items() if name not in wrong_type}
    return [*wrong_type.values(), *_range_problems(sound), *_relation_problems(sound)]


def _type_problems(values: Mapping[str, Any]) -> dict[str, str]:
    """One problem per key of a wrong type."""
    problems = {}
    for name, value in values.items():
        shown = _shown(value)
        if name in _INTEGERS or name in _OPTIONAL_INTEGERS:
            if not _is_integer(value) and not (value is None and name in _OPTIONAL_INTEGERS):
                problems[name] = f"{name} must be an integer, found {shown}"
        elif name == "eos_token_id":
            if value is not None and not _is_integer(value) and not _is_integers(value):
                problems[name] = f"{name} must be an integer or a list of at least one, found {shown}"
        elif name in ("layer_norm_eps", "rope_theta"):
            if not _is_finite_number(value):
                problems[name] = f"{name} must be a finite number, found {shown}"
        elif name == "tie_word_embeddings":
            if not isinstance(value, bool):
                problems[name] = f"{name} must be true or false, found {shown}"
        elif value not in _CHOICES[name]:
            problems[name] = f"{name} must be one of {', '.join(_CHOICES[name])}, found {shown}"
    return problems


def _range_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for name in _POSITIVE:
        value, least = values.get(name), _MINIMA.get(name)
        if value is None or (value == 0 and name in _DERIVED):
            continue
        if least is not None and value < least:
            yield f"{name} must be at least {least}, found {_shown(value)}"
        elif value <= 0:
            yield f"{name} must be greater than 0, found {_shown(value)}"
        elif value > _MAXIMA.get(name, value):
            yield f"{name} must be at most {_MAXIMA[name]} in this version, found {_shown(value)}"
    name = "correction_intermediate_size"
    if values.get("model_type") == RECURRENT and name in values and (values[name] is None or values[name] <= 0):
        yield f"{name} must be greater than 0, found {_shown(values[name])}"


def _relation_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Values that contradict each other, as far as they are there and of the right type."""
    hidden, heads = values.get("hidden_size", 0), values.get("num_attention_heads", 0)
    head_dim = values.get("head_dim", 0)
    if heads > 0 and hidden % heads:
        yield f"hidden_size {_shown(hidden)} is not a multiple of num_attention_heads {_shown(heads)}"
    elif (head_dim or (hidden // heads if heads > 0 else 0)) % 2:
        yield f"head_dim must be even for rotary embedding, found {_shown(head_dim or hidden // heads)}"
    vocabulary = values.get("vocab_size")
    for name in ("bos_token_id", "eos_token_id"):
        given = values.get(name)
        for token in given if isinstance(given, list | tuple) else (given,):
            if token is not None and vocabulary is not None and not 0 <= token < vocabulary:
                yield f"{name} must be in [0, vocab_size = {_shown(vocabulary)}), found {_shown(token)}"
    if values.get("tokenizer") == "byte" and vocabulary is not None and vocabulary < BYTE_VOCABULARY:
        yield f"the byte tokenizer needs vocab_size >= {BYTE_VOCABULARY}, found {vocabulary}"
    trained, positions = values.get("training_sequence_length"), values.get("max_position_embeddings")
    if trained is not None and positions is not None and trained > positions:
        yield f"training_sequence_length {_shown(trained)} is above max_position_embeddings {positions}"


def _unsupported(config: ModelConfig) -> Iterator[str]:
    if config.format_version != FORMAT_VERSION:
        yield f"format_version {config.format_version} (this version reads {FORMAT_VERSION}; upgrade crt-export)"
    if config.num_key_value_heads != config.num_attention_heads:
        yield f"num_key_value_heads {config.num_key_value_heads} different from num_attention_heads (grouped queries)"
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        yield f"head_dim {config.head_dim} x {config.num_attention_heads} heads different from hidden_size"
