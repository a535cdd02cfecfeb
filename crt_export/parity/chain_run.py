"""Rows of a target on texts, fed their own state and caches, and everything they deliver against the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from crt_export.model import Model
from crt_export.parity.chain_errors import ChainErrors
from crt_export.parity.runner import Runner
from crt_export.parity.trace import Trace

#: Slots beyond the last token where the capacity is ours to choose: something that must stay zero.
_SPARE_SLOTS = 8
_TINY = float(np.finfo(np.float32).tiny)


class ChainReference:
    """What the reference says about a trace, by output name, as numpy arrays."""

    def __init__(self, model: Model, trace: Trace, factors: Sequence[np.ndarray]) -> None:
        """Take the caches apart by name and find the largest |value| of every tensor.

        Args:
            model: The reference, for logits.
            trace: What it delivered.
            factors: Per layer what the target divides the values in its cache by, [heads, 1, head_dim].
        """
        self.model, self.trace = model, trace
        self.caches: dict[str, np.ndarray] = {}
        self.factors: dict[str, np.ndarray] = {}
        for layer, (keys, values, factor) in enumerate(zip(trace.keys, trace.values, factors, strict=True)):
            name = f"present_key_values.{layer}"
            self.caches[f"{name}.key"] = keys.numpy()
            self.caches[f"{name}.value"] = values.numpy()
            self.factors[f"{name}.value"] = factor
        self.scales = {name: _largest(values) for name, values in self.caches.items()}
        self.scales["next_state"] = _largest(trace.hidden.numpy())
        steps = range(trace.ids.shape[1])
        self.scales["logits"] = max(_largest(self.logits(slice(None), step)) for step in steps)

    @torch.no_grad()
    def logits(self, texts: slice, step: int) -> np.ndarray:
        """Float32 [texts, vocab]."""
        return self.model.head(self.trace.hidden[texts, step]).numpy()

    def state(self, texts: slice, step: int) -> np.ndarray:
        """Float32 [texts, 1, hidden]."""
        return self.trace.hidden[texts, step : step + 1].numpy()


class TargetChain:
    """One target on the buffers of a few rows, which it keeps from text to text as a deployed session does."""

    def __init__(self, runner: Runner, reference: ChainReference, rows: int) -> None:
        """Allocate.

        Args:
            runner: The target.
            reference: What it is compared with.
            rows: Texts per call.
        """
        self._reference = reference
        self._decoding = runner.decoding(rows, reference.trace.ids.shape[1] + _SPARE_SLOTS)
        self._written: dict[str, np.ndarray] = {}

    def reset(self) -> None:
        """Forget everything, as a session does before another text."""
        self._decoding.reset()
        self._written = {}

    def prefill(self, passes: int, texts: slice, first: int, errors: ChainErrors) -> None:
        """Take the first tokens of some texts in K passes and compare what is handed over.

        Raises:
            ContractError: The graph failed.
        """
        start = self._reference.trace.start
        self._decoding.prefill(self._reference.trace.ids[texts, :start], passes)
        self._compare(texts, first, slice(0, start), errors)

    def step(self, position: int, texts: slice, first: int, errors: ChainErrors) -> None:
        """Feed one token of some texts and compare every output.

        Args:
            position: Tokens before it.
            texts: Which texts of the trace.
            first: Their index among the texts of ``errors``.
            errors: Takes the result.

        Raises:
            ContractError: The graph failed.
        """
        self._decoding.step(self._reference.trace.ids[texts, position])
        self._compare(texts, first, slice(position, position + 1), errors)

    def outputs(self, position: int, texts: slice) -> dict[str, np.ndarray]:
        """Feed one token of some texts and copy what it gives."""
        self._decoding.step(self._reference.trace.ids[texts, position])
        found = {name: self._decoding.output(name) for name in ("next_state", "logits")}
        return {name: np.array(values) for name, values in found.items() if values is not None}

    def cache_problems(self, windows: Sequence[int]) -> list[str]:
        """What was written to a cache after its step, or beyond the last token; ``windows`` names the rows."""
        end, problems = self._reference.trace.ids.shape[1], []
        for name, written in self._written.items():
            changed = np.any(_differs(self._output(name), written), axis=(1, 3))
            for first, part, what in (
                (0, changed[:, :end], "was written to again after its own step"),
                (end, changed[:, end:], f"is not zero, though only {end} tokens were fed"),
            ):
                if part.any():
                    row, slot = (int(index) for index in np.argwhere(part)[0])
                    problems.append(f"{name} of window {windows[row]}: slot {first + slot} {what}")
        return problems

    def _compare(self, texts: slice, first: int, slots: slice, errors: ChainErrors) -> None:
        step, found = slots.stop - 1, {}
        for name, expected in self._reference.caches.items():
            cache = self._output(name)
            new = cache[:, :, slots]
            self._written.setdefault(name, np.zeros_like(cache))[:, :, slots] = new
            new = new.astype(np.float32) * self._reference.factors.get(name, np.float32(1))
            found[name] = _errors(new, expected[texts, :, slots], self._reference.scales[name])
        if self._decoding.output("next_state") is not None:
            scale = self._reference.scales["next_state"]
            found["next_state"] = _errors(self._output("next_state"), self._reference.state(texts, step), scale)
        logits, expected = self._output("logits"), self._reference.logits(texts, step)
        found["logits"] = _errors(logits, expected, self._reference.scales["logits"])
        tokens, positions = self._output("next_token")[:, 0], self._output("next_position")
        details = {
            "next_token": [*map(_token_problem, tokens, logits, expected)],
            "next_position": [
                "" if position == step + 1 else f"is {position}, expected {step + 1}" for position in positions
            ],
        }
        found["next_token"] = _token_errors(tokens, logits, expected, self._reference.scales["logits"])
        found["next_position"] = np.abs(positions - (step + 1)).astype(np.float64)
        errors.add(first, step, found, details)

    def _output(self, name: str) -> np.ndarray:
        values = self._decoding.output(name)
        assert values is not None  # every graph of the contract has it
        return values


def tensor_order(reference: ChainReference, recurrent: bool) -> list[str]:
    """The outputs in the order in which a step computes them."""
    return [*reference.caches, *(["next_state"] if recurrent else []), "logits", "next_token", "next_position"]


def _largest(values: np.ndarray) -> float:
    return max(float(np.abs(values).max()), _TINY)


def _errors(found: np.ndarray, expected: np.ndarray, scale: float) -> np.ndarray:
    """Largest |difference| over the scale, per row; NaN stays NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(found - expected)
    return difference.reshape(len(found), -1).max(axis=1).astype(np.float64) / scale


def _token_errors(tokens: np.ndarray, logits: np.ndarray, expected: np.ndarray, scale: float) -> np.ndarray:
    """The smallest logit error that explains each token: half the reference's margin, over the scale."""
    inside = (tokens >= 0) & (tokens < logits.shape[1])
    chosen = np.where(inside, tokens, 0)
    rows = np.arange(len(tokens))
    margin = expected.max(axis=1) - expected[rows, chosen]
    # Where logits are NaN they are named themselves, and no token is right or wrong.
    own = ~np.isfinite(logits).all(axis=1) | (logits[rows, chosen] == logits.max(axis=1))
    return np.where(inside & own, margin / (2 * scale), np.inf)


def _token_problem(token: int, logits: np.ndarray, expected: np.ndarray) -> str:
    if not 0 <= token < len(logits):
        return f"is {token}, expected an id below {len(logits)}"
    if not np.isfinite(logits).all():
        return ""
    if logits[token] != logits.max():
        return f"is {token}, expected the argmax of logits, {int(logits.argmax())}"
    if token != expected.argmax():
        margin = float(expected.max() - expected[token])
        return f"is {token}, expected {int(expected.argmax())}, whose logit is {margin:.3g} larger in the reference"
    return ""


def _differs(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.not_equal(found, expected) & ~(np.isnan(found) & np.isnan(expected))
