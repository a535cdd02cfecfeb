"""Why the user's own model and this package's differ: the first variation that makes the difference go away."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crt_export.checkpoint import Checkpoint
from crt_export.model import Model, model_from_checkpoint
from crt_export.parity.expected_outputs import (
    ExpectedOutputs,
    Passes,
    hidden_differences,
    logit_differences,
    run_model,
)
from crt_export.parity.own_model_variations import CONFIG, UNSUPPORTED, Variation, variations
from crt_export.progress import Progress

#: Positions from the first one that differs, which variations are tried on; what explains these is run on all of them.
_POSITIONS, _LATEST_START = 6, 64
#: Variations whose differences are both rounding, or within the factor, explain equally well: the first one is named.
_ROUNDING, _AS_GOOD = 1e-5, 2.0
#: Largest difference that arithmetic of fewer bits gives: bfloat16 3e-2 on the demo.
_SMALL = 0.1
_LINEAR_COLUMNS, _SPARE_ROWS = 512, 16


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What explains a difference.

    Attributes:
        variations: What the user's model does otherwise.
        before: Largest difference without it, deviations.
        after: With it, over all positions.
    """

    variations: tuple[Variation, ...]
    before: float
    after: float

    @property
    def in_config(self) -> bool:
        """Whether config.json can express it."""
        return all(variation.advice == CONFIG for variation in self.variations)

    @property
    def sentence(self) -> str:
        """With what the difference falls to what, and what to do about it."""
        words = " and ".join(variation.words for variation in self.variations)
        steps = [_step(advice, self.variations) for advice in dict.fromkeys(v.advice for v in self.variations)]
        return f"with {words} the difference falls from {self.before:.2g} to {self.after:.1g}: {'; '.join(steps)}"


def _step(advice: str, causes: Sequence[Variation]) -> str:
    words = [cause.words for cause in causes if cause.advice == advice]
    if advice == UNSUPPORTED:
        return f"your model uses {' and '.join(words)}, {UNSUPPORTED}"
    return advice if len(words) == 1 else advice.replace("set it", "set both")


@dataclass(frozen=True, kw_only=True)
class Search:
    """Where causes are looked for.

    Attributes:
        checkpoint: The checkpoint.
        expected: What the user's model gave.
        passes: The regime under test.
        before: Largest difference of the logits as they are, deviations.
        first: First position that differs by more than the limit.
        limit: What explains must fall to.
        progress: Told how many variations were tried.
    """

    checkpoint: Checkpoint
    expected: ExpectedOutputs
    passes: Passes
    before: float
    first: int
    limit: float
    progress: Progress

    def single(self) -> Cause | None:
        """The one variation that explains the difference; None where none does."""
        return self._shifted() or self._best([(one,) for one in self._variations()])

    def pair(self) -> Cause | None:
        """Two variations that explain it together, of those that are worth trying so."""
        paired = [one for one in self._variations() if one.pair]
        return self._best([(a, b) for a, b in itertools.combinations(paired, 2) if a.pair != b.pair])

    def _variations(self) -> list[Variation]:
        return variations(self.checkpoint.config, self.passes, self.expected.passes is not None, self.first)

    def _best(self, candidates: Sequence[tuple[Variation, ...]]) -> Cause | None:
        """The candidate of the smallest difference, if it explains all positions."""
        tried: list[tuple[float, int]] = []
        for index, candidate in enumerate(candidates):
            self.progress("your own model differs: looking for the cause", index, len(candidates))
            # Only a window does nothing before the first position that differs by more than the limit.
            late = any("sliding_window" in one.config for one in candidate)
            start = self.first if late else min(self.first, _LATEST_START)
            tried.append((self.difference(candidate, start + _POSITIONS), index))
        least = min(tried, default=(math.inf, 0))[0]
        for after, index in tried:
            if after <= min(self.limit, max(_ROUNDING, _AS_GOOD * least)):
                whole = self.difference(candidates[index], self.expected.positions)
                if whole <= self.limit:
                    return Cause(variations=candidates[index], before=self.before, after=whole)
        return None

    def difference(self, candidate: Sequence[Variation], positions: int) -> float:
        """Largest difference of the logits over the first positions; infinity where it is no number."""
        passes = next((one.passes for one in candidate if one.passes is not None), self.passes)
        before = [token for one in candidate for token in one.before]
        room = self.checkpoint.config.max_position_embeddings - len(before)
        ids = self.expected.input_ids[: min(positions, room)]
        model = self._model(candidate)
        h = run_model(model, torch.cat([ids.new_tensor(before), ids]), passes)[len(before) :]
        found = float(logit_differences(model, h, self.expected).amax())
        return math.inf if math.isnan(found) else found

    def _model(self, candidate: Sequence[Variation]) -> Model:
        """A new model, so that an edit harms no other."""
        changes = {key: value for one in candidate for key, value in one.config.items()}
        config = dataclasses.replace(self.checkpoint.config, **changes)
        tensors = dict(self.checkpoint.tensors)
        if config.tie_word_embeddings:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
        model = model_from_checkpoint(dataclasses.replace(self.checkpoint, config=config, tensors=tensors))
        for edit in (one.edit for one in candidate if one.edit is not None):
            edit(model)
        return model

    def _shifted(self) -> Cause | None:
        """Logits that stand one row too early or too late, as where they were cut to fit the next tokens."""
        model = model_from_checkpoint(self.checkpoint)
        h = run_model(model, self.expected.input_ids, self.passes)
        for words, ours, theirs in (
            ("your logits moved up by one row", h[:-1], self.expected.logits[1:]),
            ("your logits moved down by one row", h[1:], self.expected.logits[:-1]),
        ):
            part = dataclasses.replace(self.expected, logits=theirs)
            after = float(logit_differences(model, ours, part).amax())
            if after <= self.limit:
                advice = "row t of logits must be what your model gives after token t of input_ids"
                shift = Variation(words=words, advice=advice)
                return Cause(variations=(shift,), before=self.before, after=after)
        return None


def head_fact(checkpoint: Checkpoint, model: Model, h: Tensor, expected: ExpectedOutputs, limit: float) -> str:
    """That everything before the head agrees, so that the head differs; empty where it does not or cannot be told.

    Args:
        checkpoint: The checkpoint.
        model: This package's, in FP32.
        h: Its hidden states in the regime under test, [n, hidden].
        expected: What the user's model gave.
        limit: Of a difference.
    """
    if expected.hidden is not None:
        worst = float(hidden_differences(h, expected).amax())
        if not worst <= limit:
            return ""
        found = f"the hidden states agree (largest difference {worst:.1g})"
    elif _is_linear(model.final_norm(h), expected, limit):
        found = "your logits are a linear function of this package's normed hidden states"
    else:
        return ""
    return f"{found}, so your model's head is another one: {_mended_head(checkpoint)}"


def facts(
    checkpoint: Checkpoint, h: Tensor, expected: ExpectedOutputs, differences: Tensor, limit: float
) -> Iterator[str]:
    """What is known of a difference without a cause: where it begins, how it grows, and what was not tried.

    Args:
        checkpoint: The checkpoint.
        h: This package's hidden states in the regime under test, [n, hidden].
        expected: What the user's model gave.
        differences: Of the logits, by position.
        limit: Of a difference.
    """
    if not bool(differences[0] <= limit):
        yield (
            "position 0 differs already, where attention sees one token and h is 0: embedding, correction, norms, "
            "activation, v and o or head, not the rotary embedding"
        )
    else:
        first = int((~(differences <= limit)).nonzero()[0])
        agree = "position 0 agrees" if first == 1 else f"positions 0 to {first - 1} agree"
        yield f"{agree}: what differs is attention's positions or window, or the state, and not the head"
    half = len(differences) // 2
    early, late = float(differences[:half].mean()), float(differences[half:].mean())
    yield f"mean of the largest differences {early:.2g} in the first half and {late:.2g} in the second"
    if float(differences.amax()) < _SMALL:
        yield "so small a difference may be TF32, bfloat16 or float16 in your model: run it in float32 on a CPU"
    if expected.hidden is not None:
        worst = float(hidden_differences(h, expected).amax())
        yield f"the hidden states differ too, by {worst:.2g} of their deviation, so it is not the head alone"
    else:
        yield "save 'hidden' too and this tells whether the head differs"
        if checkpoint.config.tie_word_embeddings:
            yield f"a head of its own could not be tried: {_mended_head(checkpoint)}"


def _mended_head(checkpoint: Checkpoint) -> str:
    if checkpoint.config.tie_word_embeddings:
        return (
            "tie_word_embeddings = true says that it is the embedding: set it to false in config.json and write your "
            "model's lm_head.weight and lm_head.bias to model.safetensors"
        )
    return "write its lm_head.weight and lm_head.bias, and its final_norm, to model.safetensors"


def _is_linear(features: Tensor, expected: ExpectedOutputs, limit: float) -> bool:
    """Whether one matrix and bias give the logits of all positions; False where there are too few to tell."""
    if len(features) < features.shape[1] + 1 + _SPARE_ROWS:
        return False
    inputs = torch.cat([features, features.new_ones(len(features), 1)], dim=1).double()
    wanted = expected.logits[:, :_LINEAR_COLUMNS].double()
    solution = torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
    return float((inputs @ solution - wanted).abs().amax()) <= limit * expected.deviation
