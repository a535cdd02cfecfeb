"""``config.json`` of a checkpoint: every key checked, every problem reported at once.

What all architectures have in common stands here; each adds its own keys in its file of :mod:`crt_export.models`.
Imports neither torch nor onnx.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from crt_export.errors import CheckpointError, UnsupportedError, problem_list
from crt_export.models.declaration import Carried, ModelInfo
from crt_export.strict_json import json_problem, parse_unique_keys
from crt_export.user_files import read_input

FORMAT_VERSION = 1
TOKENIZERS = ("byte", "tokenizer.json", "none")
BYTE_VOCABULARY = 256
#: The rotary tables of every graph hold one row per position: 2**20 rows are half a GiB at a head_dim of 128.
MOST_POSITIONS = 2**20
#: Every layer is written once per pass into the unrolled prefill.
MOST_LAYERS = MOST_PASSES = 4096
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Key:
    """What one key of ``config.json`` takes.

    Attributes:
        is_kind: Whether a value is of the right type.
        kind: That type in words, after "must be".
        optional: Whether null is allowed.
        positive: Whether it must be greater than 0.
        least: Smallest value with a sentence of its own; None: no such.
        most: Largest value of this version; None: any.
    """

    is_kind: Callable[[object], bool]
    kind: str
    optional: bool = False
    positive: bool = False
    least: int | None = None
    most: int | None = None

    def type_problem(self, name: str, value: object) -> str | None:
        """What is wrong with the type of a value."""
        if (value is None and self.optional) or self.is_kind(value):
            return None
        return f"{name} must be {self.kind}, found {_shown(value)}"

    def range_problem(self, name: str, value: Any) -> str | None:
        """What is wrong with a value of the right type."""
        if value is None:
            return None
        if self.least is not None and value < self.least:
            return f"{name} must be at least {self.least}, found {_shown(value)}"
        if self.positive and value <= 0:
            return f"{name} must be greater than 0, found {_shown(value)}"
        if self.most is not None and value > self.most:
            return f"{name} must be at most {self.most} in this version, found {_shown(value)}"
        return None


def is_integer(value: object) -> bool:
    """Whether a value of a JSON document is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """Whether a value of a JSON document is a number that float64 holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def count(*, optional: bool = False, least: int | None = None, most: int | None = None) -> Key:
    """A whole number above 0."""
    return Key(is_kind=is_integer, kind="an integer", optional=optional, positive=True, least=least, most=most)


def number(*, optional: bool = False) -> Key:
    """A finite number above 0."""
    return Key(is_kind=is_finite_number, kind="a finite number", optional=optional, positive=True)


def one_of(*values: str) -> Key:
    """One of some texts."""
    return Key(is_kind=lambda value: isinstance(value, str) and value in values, kind=f"one of {', '.join(values)}")


FLAG = Key(is_kind=lambda value: isinstance(value, bool), kind="true or false")
_TOKEN = Key(is_kind=is_integer, kind="an integer", optional=True)
_TOKENS = Key(
    is_kind=lambda value: (
        is_integer(value) or (isinstance(value, list | tuple) and len(value) > 0 and all(map(is_integer, value)))
    ),
    kind="an integer or a list of at least one",
    optional=True,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """What every architecture has: sizes, tokens and where a sequence begins and ends.

    Every sequence begins with ``bos_token_id``, once (None: the model was trained without); ``eos_token_id`` ends one,
    any of them where there are several. ``training_sequence_length`` is the context length the model was trained at
    (None: not known).

    Attributes:
        KEYS: What each key takes.
        DERIVED: Keys whose absence asks for a value that follows from others.
        OLDER_NAMES: Other names of keys, to the name that stands for them.
        IGNORED: Keys of a relative that a file may hold and that mean nothing here.

    Raises:
        CheckpointError: A value has the wrong type, is out of range or contradicts another.
        UnsupportedError: A value is valid in the format and not implemented by this version.
    """

    KEYS: ClassVar[Mapping[str, Key]] = {
        "model_type": Key(is_kind=lambda value: isinstance(value, str), kind="text"),
        "vocab_size": count(least=2),  # one token leaves nothing to predict
        "hidden_size": count(),
        "max_position_embeddings": count(most=MOST_POSITIONS),
        "tie_word_embeddings": FLAG,
        "tokenizer": one_of(*TOKENIZERS),
        "format_version": Key(is_kind=is_integer, kind="an integer"),
        "bos_token_id": _TOKEN,
        "eos_token_id": _TOKENS,
        "training_sequence_length": count(optional=True),
    }
    DERIVED: ClassVar[tuple[str, ...]] = ()
    OLDER_NAMES: ClassVar[Mapping[str, str]] = {}
    IGNORED: ClassVar[tuple[str, ...]] = ()

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    tokenizer: str
    format_version: int = FORMAT_VERSION
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    training_sequence_length: int | None = None

    def __post_init__(self) -> None:
        """Fill derived defaults, then check types, ranges and support."""
        problems = self._value_problems({name: getattr(self, name) for name in self.keys()})
        if problems:
            raise CheckpointError(problem_list("config.json", problems))
        for name in self.keys():
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        for name, value in self.derived().items():
            object.__setattr__(self, name, value)
        unsupported = [*self.unsupported()]
        if unsupported:
            raise UnsupportedError(problem_list("config.json asks for what this version cannot do", unsupported))

    @abstractmethod
    def declare(self) -> Carried:
        """What the model carries from token to token, of an architecture."""

    @property
    def carried(self) -> Carried:
        """What the model carries from token to token."""
        return self._declared

    @cached_property
    def _declared(self) -> Carried:
        return self.declare()

    @property
    def info(self) -> ModelInfo:
        """The model as whoever runs it needs to know it."""
        return ModelInfo(
            model_type=self.model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_position_embeddings=self.max_position_embeddings,
            tokenizer=self.tokenizer,
            bos_token_id=self.bos_token_id,
            eos_token_ids=self.eos_token_ids,
            carried=self.carried,
        )

    def derived(self) -> dict[str, Any]:
        """Values of :attr:`DERIVED` keys that are absent, by key."""
        return {}

    def unsupported(self) -> Iterator[str]:
        """What this version cannot do."""
        if self.format_version != FORMAT_VERSION:
            yield f"format_version {self.format_version} (this version reads {FORMAT_VERSION}; upgrade crt-export)"

    @classmethod
    def relation_problems(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """Values that contradict each other, as far as they are there and of the right type."""
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

    @classmethod
    def missing_keys(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """Keys that a file must have and lacks; further ones where an architecture needs one of several."""
        yield from (field.name for field in fields(cls) if field.default is MISSING and field.name not in values)

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """Every key of this architecture."""
        return tuple(field.name for field in fields(cls))

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

    @property
    def parameter_count(self) -> int:
        """Number of trained weights of any size; a tied head counts once."""
        from crt_export.models.registry import tensor_shapes

        return sum(math.prod(shape) for shape in tensor_shapes(self).values())

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ModelConfig:
        """Check the keys and build the configuration of the architecture that ``model_type`` names.

        Raises:
            CheckpointError: Unknown or missing keys and impossible values of the others, all at once.
            UnsupportedError: A value is valid in the format and not implemented by this version.
        """
        from crt_export.models.registry import MODEL_TYPES, config_class

        kind = values.get("model_type")
        known = isinstance(kind, str) and kind in MODEL_TYPES
        cls = config_class(str(kind) if known else MODEL_TYPES[0])
        names = cls.keys()
        values = {key: value for key, value in values.items() if key not in cls.IGNORED}
        renamed, given = {}, {}
        for key, value in values.items():
            name = cls.OLDER_NAMES.get(key, key)
            given[name], renamed[name] = value, key
        problems = [
            f"unknown key {key!r}; known keys: {', '.join(sorted(names))}"
            for key in values
            if cls.OLDER_NAMES.get(key, key) not in names
        ]
        twice = [f"{key} and {name} are one key" for key, name in cls.OLDER_NAMES.items() if {key, name} <= set(values)]
        problems += twice
        older = {name: key for key, name in cls.OLDER_NAMES.items()}
        problems += [f"missing key {older.get(key, key)!r}" for key in sorted(cls.missing_keys(given))]
        given = {name: value for name, value in given.items() if name in names}
        given = {name: value for name, value in given.items() if not (name in cls.DERIVED and value is None)}
        # In a file 0 is a value like any other; in the class it asks for the derived one.
        problems += [
            f"{name} must be at least 1, found 0"
            for name in cls.DERIVED
            if is_integer(given.get(name)) and given[name] == 0
        ]
        if not known and "model_type" in given:
            problems.append(f"model_type must be one of {', '.join(MODEL_TYPES)}, found {_shown(kind)}")
        problems += cls._value_problems(given, renamed)
        if problems:
            raise CheckpointError(problem_list("config.json", problems))
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Every key with its resolved value, ready for JSON."""
        return asdict(self)

    @classmethod
    def _value_problems(cls, values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> list[str]:
        """What is wrong with the values that are there: types first, then the ranges of those of the right type.

        Args:
            values: By key.
            names: What the file calls each of them, where it uses an older name.
        """
        shown = dict(names or {})
        types = {}
        for name, value in values.items():
            if name == "model_type" and isinstance(value, str):
                continue
            problem = cls.KEYS[name].type_problem(shown.get(name, name), value)
            if problem is not None:
                types[name] = problem
        valid = {name: value for name, value in values.items() if name not in types}
        ranges = [
            problem
            for name, value in valid.items()
            if not (name in cls.DERIVED and value == 0)
            and (problem := cls.KEYS[name].range_problem(shown.get(name, name), value)) is not None
        ]
        return [*types.values(), *ranges, *cls.relation_problems(valid)]


def load_config(folder: str | Path) -> ModelConfig:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: The folder or file is missing, not JSON, or its values are unusable.
        UnsupportedError: It asks for a feature this version lacks.
    """
    path = Path(folder)
    values = read_config_file(path)
    try:
        return ModelConfig.from_dict(values)
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None


def read_config_file(path: Path) -> dict[str, Any]:
    """The JSON object of ``config.json`` in a folder, unchecked.

    Raises:
        CheckpointError: The folder or file is missing or holds no JSON object.
    """
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
    return values


def _frozen(value: Any) -> Any:
    """Lists as tuples, so that a configuration can be hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
