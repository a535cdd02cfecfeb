"""Compare what a session gives with the vectors of one run, tensor by tensor, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from crt_export.selftest.replay import Observed
from crt_export.selftest.report import TensorResult
from crt_export.selftest.vectors import Vectors, divisor_name


@dataclass
class _Largest:
    """The largest relative error of one tensor so far, and the first one beyond the limit."""

    error: float = 0.0
    where: str = ""
    first: str = ""
    beyond: int = 0


@dataclass(kw_only=True)
class Comparison:
    """Collects the errors of one replay.

    Attributes:
        vectors: All vectors.
        run: Name of the run that the replay must reproduce.
        precision: Precision of the target.
        limit: Largest |difference| over the largest |value| of the vectors.
    """

    vectors: Vectors
    run: str
    precision: str
    limit: float
    _tensors: dict[str, _Largest] = field(default_factory=dict)
    _tokens: list[str] = field(default_factory=list)
    _missing: list[str] = field(default_factory=list)

    def add(self, observed: Observed) -> None:
        """Compare logits, state and next token of one index."""
        index = observed.index
        expected = self.vectors.tensors[f"{self.run}.logits.{index}"]
        where, scale = place(self.vectors, index), self.vectors.scale(self.run, "logits")
        self._compare("logits", observed.logits[self.vectors.columns(index)], expected, scale, where)
        if observed.state is not None:
            states = self.vectors.tensors[f"{self.run}.state"]
            self._compare("state", observed.state, states[index], self.vectors.scale(self.run, "state"), where)
        self._check_token(observed, scale)

    def add_caches(self, observed: Observed) -> None:
        """Compare the caches: one entry per token so far."""
        tokens = self.vectors.prompt + observed.index
        for name, found in observed.caches.items():
            if found.shape[1] != tokens:
                self._missing.append(
                    f"{name} {place(self.vectors, observed.index)} holds {found.shape[1]} tokens, expected {tokens}"
                )
                continue
            expected = self.vectors.tensors[f"{self.run}.{name}"][:, :tokens]
            found = found.astype(np.float32)
            layer, _, kind = name.removeprefix("past_key_values.").partition(".")
            divisors = self.vectors.tensors.get(divisor_name(self.precision, int(layer)))
            if kind == "value" and divisors is not None:
                found *= divisors[:, None]
            with np.errstate(invalid="ignore"):
                position = int(np.abs(found - expected).max(axis=(0, 2)).argmax())
            scale = self.vectors.scale(self.run, name)
            self._compare(name, found, expected, scale, f"at position {position}")

    @property
    def results(self) -> tuple[TensorResult, ...]:
        """The largest error of every tensor."""
        return tuple(
            TensorResult(tensor=name, largest=found.error, where=found.where, limit=self.limit)
            for name, found in self._tensors.items()
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """A sentence on every tensor that is off."""
        off = [
            found.first + (f", and {found.beyond - 1} times more, at most {found.error:.3g}" * (found.beyond > 1))
            for found in self._tensors.values()
            if found.beyond
        ]
        return (*off, *self._tokens, *self._missing)

    def _compare(self, name: str, found: np.ndarray, expected: np.ndarray, scale: float, where: str) -> None:
        largest = self._tensors.setdefault(name, _Largest())
        with np.errstate(invalid="ignore"):
            error = float(np.abs(found - expected).max(initial=0.0)) / scale
        if not error <= largest.error:  # NaN too
            largest.error, largest.where = error, where
        if not error <= self.limit:
            largest.beyond += 1
            largest.first = largest.first or (
                f"{name} {where} is off by {error:.3g} of the largest |value| {scale:.3g}, the limit is {self.limit:g}"
            )

    def _check_token(self, observed: Observed, scale: float) -> None:
        index = observed.index
        where = place(self.vectors, index)
        own = int(observed.logits.argmax())
        if observed.next_token != own:
            self._tokens.append(f"next_token {where} is {observed.next_token}, but its own largest logit is {own}'s")
        expected = int(self.vectors.tensors[f"{self.run}.next_tokens"][index])
        margin = float(self.vectors.tensors[f"{self.run}.margins"][index])
        # Two logits that are each within the limit can swap places only where they are as close as this.
        near_tie = 2 * self.limit * scale
        if own != expected and margin > near_tie:
            self._tokens.append(
                f"next_token {where} is {own}, expected {expected}, whose logit leads by {margin:.3g} "
                f"(a lead of {near_tie:.3g} or less is a near tie)"
            )


def place(vectors: Vectors, index: int) -> str:
    """Where in a run an index is."""
    return f"after the prompt of {vectors.prompt} tokens" if index == 0 else f"after step {index}"
