"""Declaration of a language model: what it carries from token to token.

Exporter, quantisation, runtime and evidence are driven by it and ask for nothing else about an architecture. Imports
neither torch nor onnx: the runtime reads it from a bundle's manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Name of the state that the head reads; its tensors are called ``state`` and ``hidden``, without a name behind them.
HIDDEN = "hidden"
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
        head_dim: Channels of a head.
        window: Latest tokens that a query sees, itself included; None: all.
        rotary: How its keys are turned; None: not at all.
    """

    name: str
    heads: int
    head_dim: int
    window: int | None = None
    rotary: Rotary | None = None


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a model carries from token to token.

    Attributes:
        states: Recurrent states.
        caches: Caches in the order in which graphs number them.
        passes: Passes over a chunk that the model was trained for.
        parallel: Whether a state belongs to each token of a chunk; False: states advance within one exact pass.
        prompt: ``causal``, or ``bidirectional``: tokens of the prompt see each other.
    """

    states: tuple[StateSpec, ...] = ()
    caches: tuple[CacheSpec, ...] = ()
    passes: int = 1
    parallel: bool = True
    prompt: str = CAUSAL

    @property
    def iterated(self) -> bool:
        """Whether a chunk takes several passes, each fed the states of the one before."""
        return self.parallel and bool(self.states)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different attention windows, in the order of their first caches."""
        return tuple(dict.fromkeys(cache.window for cache in self.caches))

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
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Carried:
        """Read what :meth:`to_dict` wrote, and was checked against the schema of the manifest.

        Raises:
            ValueError: A cache names a rotation that is not there, or ``iterated`` contradicts the rest.
        """
        rotaries = [
            Rotary(layout=entry["layout"], frequencies=tuple(map(float, entry["frequencies"])))
            for entry in values["rotaries"]
        ]
        carried = cls(
            states=tuple(StateSpec(**{**entry, "shape": tuple(entry["shape"])}) for entry in values["states"]),
            caches=tuple(CacheSpec(**{**entry, "rotary": _named(rotaries, entry)}) for entry in values["caches"]),
            passes=values["passes"],
            parallel=values["parallel"],
            prompt=values["prompt"],
        )
        if carried.iterated != values["iterated"]:
            raise ValueError(f"iterated is {values['iterated']}, its states say {carried.iterated}")
        return carried


def _named(rotaries: Sequence[Rotary], entry: Mapping[str, Any]) -> Rotary | None:
    index = entry["rotary"]
    if index is None:
        return None
    if not 0 <= index < len(rotaries):
        raise ValueError(f"cache {entry['name']!r} names rotation {index} of {len(rotaries)}")
    return rotaries[index]
