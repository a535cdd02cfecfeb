"""Declaration of a language model: what it carries from token to token.

Exporter, quantisation, runtime and evidence are driven by it and ask for nothing else about an architecture. Imports
neither torch nor onnx: the runtime reads it from a bundle's manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

#: Name of the state that the head reads; its tensors are called ``state`` and ``hidden``, without a name behind them.
HIDDEN = "hidden"
#: Names of a state's tensors in the graphs, see :meth:`StateSpec.tensor`.
STATE, NEXT_STATE = "state.{name}", "next_state.{name}"
ITERATE, NEXT_ITERATE = "iterate.{name}", "next_iterate.{name}"
CAUSAL, BIDIRECTIONAL = "causal", "bidirectional"
INTERLEAVED, HALF = "interleaved", "half"


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """How the keys of a cache are turned by their position.

    Attributes:
        layout: ``interleaved`` turns the pairs (2j, 2j+1), ``half`` the pairs (j, j + head_dim/2).
        frequencies: Radians per position of each pair, [head_dim/2]; 0 leaves a pair as it is.
    """

    layout: str
    frequencies: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """A tensor that every token hands to the next one, zeros before the first.

    Attributes:
        name: Its name; ``hidden`` is the state that the head reads.
        shape: Its dims per token, such as (hidden,).
        dtype: At the border of a graph.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def tensor(self, pattern: str) -> str:
        """The name of one of its tensors in a graph.

        Args:
            pattern: Name in a contract, such as ``next_state.{name}`` or ``iterate.{name}``.
        """
        if self.name != HIDDEN:
            return pattern.replace("{name}", self.name)
        return pattern.removesuffix(".{name}").replace("iterate", HIDDEN)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Keys and values that later tokens read.

    Attributes:
        name: For messages and the manifest; graphs number the caches.
        heads: Heads of keys and values.
        query_heads: Heads that attend over them, a multiple.
        head_dim: Channels of a head.
        window: Latest tokens that a query sees, itself included; None: all.
        rotary: How its keys are turned; None: not at all.
    """

    name: str
    heads: int
    query_heads: int
    head_dim: int
    window: int | None = None
    rotary: Rotary | None = None

    @property
    def width(self) -> int:
        """Numbers that a token leaves in it: its key and its value."""
        return 2 * self.heads * self.head_dim

    def attended(self, position: int) -> int:
        """Tokens that the token at a position sees, itself included."""
        used = position + 1
        return used if self.window is None else min(used, self.window)


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a model carries from token to token.

    Attributes:
        states: Recurrent states.
        caches: Caches in the order in which graphs number them.
        passes: Passes over a chunk that the model was trained for.
        parallel: Whether a state belongs to each token of a chunk; False: states advance within one exact pass.
        prompt: ``causal``, or ``bidirectional``: tokens of the prompt see each other.
        relative: Whether positions enter by the rotation of keys and queries alone, so that what a cache holds may move
            to earlier positions.
    """

    states: tuple[StateSpec, ...] = ()
    caches: tuple[CacheSpec, ...] = ()
    passes: int = 1
    parallel: bool = True
    prompt: str = CAUSAL
    relative: bool = True

    @property
    def iterated(self) -> bool:
        """Whether a chunk takes several passes, each fed the states of the one before."""
        return self.parallel and bool(self.states)

    def row_bytes(self, capacity: int) -> dict[str, int]:
        """Bytes of what one row holds: its states, and caches of a capacity in each of their dtypes, JSON-ready."""
        values = capacity * sum(cache.width for cache in self.caches)
        return {
            "state_bytes": 4 * sum(state.size for state in self.states),
            "cache_bytes_float32": 4 * values,
            "cache_bytes_float16": 2 * values,
        }

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; a rotation that several caches have is written once."""
        rotaries = list(dict.fromkeys(cache.rotary for cache in self.caches if cache.rotary is not None))
        return {
            "states": [asdict(state) for state in self.states],
            "caches": [
                {**asdict(cache), "rotary": None if cache.rotary is None else rotaries.index(cache.rotary)}
                for cache in self.caches
            ],
            "rotaries": [asdict(rotary) for rotary in rotaries],
            "passes": self.passes,
            "parallel": self.parallel,
            "iterated": self.iterated,
            "prompt": self.prompt,
            "relative": self.relative,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Carried:
        """Read what :meth:`to_dict` wrote, and was checked against the schema of the manifest.

        Raises:
            ValueError: A cache names a rotation that is not there or not its own, two states have one name, or
                ``iterated`` contradicts the rest.
        """
        rotaries = [
            Rotary(layout=entry["layout"], frequencies=tuple(map(float, entry["frequencies"])))
            for entry in values["rotaries"]
        ]
        carried = cls(
            states=tuple(
                StateSpec(name=entry["name"], shape=tuple(entry["shape"]), dtype=entry["dtype"])
                for entry in values["states"]
            ),
            caches=tuple(
                CacheSpec(**{**{key: entry[key] for key in _CACHE_KEYS}, "rotary": _named(rotaries, entry)})
                for entry in values["caches"]
            ),
            passes=values["passes"],
            parallel=values["parallel"],
            prompt=values["prompt"],
            relative=values["relative"],
        )
        if carried.iterated != values["iterated"]:
            raise ValueError(f"iterated is {values['iterated']}, its states say {carried.iterated}")
        names = [state.name for state in carried.states]
        if len(set(names)) != len(names):
            raise ValueError(f"two states have one name, found {', '.join(names)}")
        return carried


#: A manifest's entry may hold others, which a later version adds.
_CACHE_KEYS = tuple(field.name for field in fields(CacheSpec))


def _named(rotaries: Sequence[Rotary], entry: Mapping[str, Any]) -> Rotary | None:
    index = entry["rotary"]
    if index is None:
        return None
    if not 0 <= index < len(rotaries):
        raise ValueError(f"cache {entry['name']!r} names rotation {index} of {len(rotaries)}")
    if len(rotaries[index].frequencies) != entry["head_dim"] // 2:
        raise ValueError(f"cache {entry['name']!r} has heads of {entry['head_dim']}, its rotation not as many pairs")
    return rotaries[index]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model as its graphs and whoever runs them need to know it; a section of a bundle's manifest.

    Attributes:
        model_type: Name of the architecture, for messages.
        vocab_size: Logits of a token.
        hidden_size: Size of what the head reads.
        max_position_embeddings: Most tokens of a sequence.
        tokenizer: ``byte``, ``tokenizer.json`` or ``none``.
        bos_token_id: The token that every sequence begins with, or None.
        eos_token_ids: The tokens that end one; empty if there is none.
        carried: What it carries from token to token.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    tokenizer: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    carried: Carried

    @property
    def special_token_ids(self) -> frozenset[int]:
        """What begins or ends a sequence."""
        return frozenset(self.eos_token_ids) | ({self.bos_token_id} if self.bos_token_id is not None else set())

    def to_dict(self) -> dict[str, Any]:
        """The section of the manifest."""
        return {
            "architecture": self.model_type,
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "max_positions": self.max_position_embeddings,
            "tokenizer": self.tokenizer,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": list(self.eos_token_ids),
            **self.carried.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelInfo:
        """Read the section of a manifest, checked against its schema.

        Raises:
            ValueError: It contradicts itself.
        """
        carried = Carried.from_dict(values)
        if any(state.name == HIDDEN and state.shape != (values["hidden"],) for state in carried.states):
            raise ValueError(f"the state 'hidden' is what the head reads, so its shape is [{values['hidden']}]")
        return cls(
            model_type=values["architecture"],
            vocab_size=values["vocab"],
            hidden_size=values["hidden"],
            max_position_embeddings=values["max_positions"],
            tokenizer=values["tokenizer"],
            bos_token_id=values["bos_token_id"],
            eos_token_ids=tuple(values["eos_token_ids"]),
            carried=carried,
        )
