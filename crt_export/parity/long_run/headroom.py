"""The largest |value| of every FP16 tensor over a long run, gathered by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from crt_export.parity.headroom import observing_engine
from crt_export.parity.long_run.reference import LongReference
from crt_export.parity.long_run.run import Steps
from crt_export.parity.long_run.schedule import Schedule
from crt_export.parity.setup import ParityCase, ParitySetup

_WEIGHT = re.compile(r"(embed|correction|layers\.\d+|final_norm|lm_head)\.")
_SUFFIX = " (bound of its scores)"
#: Tensors made of positions alone: rotary tables, masks.
NO_LAYER = "positions"
STATE = "state"
_FIRST = (NO_LAYER, STATE, "embed", "correction")
_LAST = ("final_norm", "lm_head")


@dataclass(frozen=True, kw_only=True)
class LongHeadroom:
    """Largest |value| by tensor, infinite where a value is NaN.

    Attributes:
        whole: Over the whole run, largest first.
        trained: At positions below the training length only.
        layers: Layer of every tensor, in the order of the model.
    """

    whole: Mapping[str, float]
    trained: Mapping[str, float]
    layers: Mapping[str, str]

    def by_layer(self, values: Mapping[str, float]) -> dict[str, float]:
        """Largest value per layer, in the order of the model."""
        largest: dict[str, float] = {}
        for tensor, layer in self.layers.items():
            if tensor in values:
                largest[layer] = max(largest.get(layer, 0.0), values[tensor])
        return largest


def observe_long_run(
    case: ParityCase, setup: ParitySetup, schedule: Schedule, reference: LongReference
) -> LongHeadroom:
    """Run the observed step graph over the tokens.

    Raises:
        ContractError: The graph cannot be read or run, or the type of a tensor cannot be told.
    """
    engine = observing_engine(setup.runner(case), case, "step", setup.threads)
    steps = Steps(setup.runner(case).over(engine), schedule, reference.windows.inputs)
    gated = schedule.gated_tokens
    trained: dict[str, float] = {}
    for step, _ in steps.run(setup.progress, f"{case.target}: FP16 values, {schedule.kind}"):
        if step == gated - 1:
            trained = engine.largest()
    whole = engine.largest()
    return LongHeadroom(
        whole=dict(sorted(whole.items(), key=lambda item: -item[1])),
        trained=trained,
        layers=layers_of_tensors(case.graphs["step"], list(whole)),
    )


def layers_of_tensors(path: Path, tensors: list[str]) -> dict[str, str]:
    """The layer that computes each observed tensor, in the order of the graph.

    Names of tensors do not say it, names of weights do: a node belongs to the layer of the weight it reads, else to the
    latest layer among the tensors it reads.

    Args:
        path: The graph.
        tensors: Names of tensors, or of nodes followed by what is observed of them.
    """
    scopes = {STATE: STATE}
    for node in onnx.load(path, load_external_data=False).graph.node:
        own = [match[1] for name in node.input if (match := _WEIGHT.match(name))]
        scope = max(own or [scopes.get(name, NO_LAYER) for name in node.input] or [NO_LAYER], key=_rank)
        scopes |= dict.fromkeys((*node.output, node.name), scope)
    layers = {name: scopes.get(name.removesuffix(_SUFFIX), NO_LAYER) for name in tensors}
    return dict(sorted(layers.items(), key=lambda item: _rank(item[1])))


def _rank(layer: str) -> tuple[int, int]:
    """Place in the model, from the token to the logits."""
    if layer in _FIRST:
        return 0, _FIRST.index(layer)
    if layer in _LAST:
        return 2, _LAST.index(layer)
    return 1, int(layer.rpartition(".")[2])
