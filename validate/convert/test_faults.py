"""Mistakes that conversions are known to make, each injected: the gate of the right ones sees them all.

A mistake in a family's file is made in what that file returns, one in the arithmetic in the plan that follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crt_export.convert import families, plan
from crt_export.convert.family import Family, Folds, Fused, kinds_by_interval
from crt_export.convert.fold import Recipe
from crt_export.convert.gemma import read_gemma3
from crt_export.convert.keys import Keys
from crt_export.convert.plan import Plan
from crt_export.convert.rotary import FULL, SLIDING, rotary_set
from crt_export.errors import CheckpointError, UnsupportedError

Theirs = Callable[[str], tuple[Path, torch.Tensor]]
Logits = Callable[[Plan, Path], torch.Tensor]
Mistake = Callable[[Family], Family]


def _config(**values: Any) -> Mistake:
    return lambda family: replace(family, config={**family.config, **values})


def _folds(**values: Any) -> Mistake:
    return lambda family: replace(family, folds=replace(family.folds, **values))


def _layers(change: Callable[[int, Any, Any], tuple[Any, Any]]) -> Mistake:
    def made(family: Family) -> Family:
        changed = (change(index, window, turned) for index, (window, turned) in enumerate(family.layers))
        return replace(family, layers=tuple(changed))

    return made


def _frequencies(theta: float, head_dim: int) -> Mistake:
    turned = rotary_set(None, head_dim, 128, theta=theta)
    return _layers(lambda _, window, right: (window, right and turned))


def _fused(change: Callable[[Fused], Fused]) -> Mistake:
    def made(family: Family) -> Family:
        names = {theirs: change(ours) if isinstance(ours, Fused) else ours for theirs, ours in family.names.items()}
        return replace(family, names=names)

    return made


def _before(family: Family) -> Family:
    """Norms of what a branch gives as norms of what it takes."""
    names = {theirs: _pre(ours) for theirs, ours in family.names.items()}
    return replace(family, names=names, config={**family.config, "norm_placement": "pre"})


def _pre(ours: Any) -> Any:
    return ours.replace("_post_norm", "_norm") if isinstance(ours, str) else ours


def _local_everywhere(family: Family) -> Family:
    first = family.layers[0][1]
    return _layers(lambda _, window, turned: (window, first))(family)


FAMILY_MISTAKES: Mapping[str, tuple[str, Mistake]] = {
    "gelu_new as exact gelu": ("gpt2", _config(activation="gelu")),
    "exact gelu as tanh": ("gpt_neox", _config(activation="gelu_tanh")),
    "epsilon 1e-6 for 1e-5": ("olmo2", _config(norm_eps=1e-6)),
    "interleaved for half": ("llama", _config(rope_layout="interleaved")),
    "half for interleaved": ("cohere norms", _config(rope_layout="half")),
    "queries, keys, values as blocks": ("gpt_neox", _fused(lambda fused: replace(fused, grouped=False))),
    "queries, keys, values as groups": ("phi3", _fused(lambda fused: replace(fused, grouped=len(fused.parts) == 3))),
    "gate and up swapped": ("phi3", _fused(lambda fused: replace(fused, parts=_swapped(fused.parts)))),
    "sequential for parallel": ("gpt_neox", _config(parallel_residual=False)),
    "gain for 1 + gain, Gemma": ("gemma", _folds(gain=0.0)),
    "gain for 1 + gain, Nemotron": ("nemotron", _folds(gain=0.0)),
    "embeddings not scaled": ("gemma", _folds(embedding=1.0)),
    "branches not scaled": ("granite", _folds(branch=1.0)),
    "logits not scaled": ("cohere", _folds(logits=1.0)),
    "scores not scaled by the multiplier": ("granite", _folds(query=())),
    "cap of logits ignored": ("gemma3_text capped", _config(logit_softcap=None)),
    "window too long by one": ("mistral", _layers(lambda _, window, turned: (window + 1, turned))),
    "window too short by one": ("gpt_neo", _layers(lambda _, window, turned: (window and window - 1, turned))),
    "window ignored": ("mistral", _layers(lambda _, window, turned: (None, turned))),
    "windows on the wrong layers": ("qwen2 windows", _layers(lambda index, _, turned: (None if index else 8, turned))),
    "one base for two kinds of layers": ("gemma3_text", _local_everywhere),
    "query_pre_attn_scalar ignored": ("gemma3_text", _folds(query=())),
    "factor of yarn ignored": ("llama yarn", _layers(lambda _, w, turned: (w, replace(turned, factor=1.0)))),
    "frequencies of yarn ignored": ("llama yarn", _layers(lambda _, w, turned: (w, _plain(turned)))),
    "scaling of llama3 ignored": ("llama llama3", _frequencies(10000.0, 8)),
    "linear scaling ignored": ("llama linear", _frequencies(10000.0, 8)),
    "keys turned in layers that turn none": (
        "smollm3",
        _layers(lambda _, window, turned: (window, turned or rotary_set(None, 8, 128, theta=2000000.0))),
    ),
    "norms before the branches": ("olmo2", _before),
    "mean not subtracted": ("cohere norms", _config(norm="rms")),
    "scores scaled, GPT-Neo": ("gpt_neo", _folds(query=())),
    "1/(layer + 1) ignored": ("gpt2 1/(i+1)", _folds(query=())),
}


def _swapped(parts: tuple[str, ...]) -> tuple[str, ...]:
    return parts[::-1] if len(parts) == 2 else parts


def _plain(turned: Any) -> Any:
    return replace(rotary_set(None, 8, 128, theta=10000.0), factor=turned.factor)


def _difference(plan_: Plan, folder: Path, expected: torch.Tensor, plan_logits: Logits) -> float:
    return float((plan_logits(plan_, folder) - expected).abs().max())


@pytest.mark.parametrize("name", FAMILY_MISTAKES)
def test_the_gate_sees_a_mistake_in_a_family(
    name: str,
    theirs: Theirs,
    plan_of: Callable[[Path], Plan],
    plan_logits: Logits,
    gate: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variant, mistake = FAMILY_MISTAKES[name]
    folder, expected = theirs(variant)

    def read(keys: Keys) -> tuple[str, Family]:
        kind, family = families.read_family(keys)
        return kind, mistake(family)

    monkeypatch.setattr(plan, "read_family", read)
    assert _difference(plan_of(folder), folder, expected, plan_logits) > 3 * gate


def _changed(name: str, change: Callable[[Recipe], Recipe]) -> Callable[[Plan], Plan]:
    def made(right: Plan) -> Plan:
        assert any(name in key for key in right.recipes)
        recipes = {key: change(recipe) if name in key else recipe for key, recipe in right.recipes.items()}
        return replace(right, recipes=recipes)

    return made


def _recipes(name: str, **values: Any) -> Callable[[Plan], Plan]:
    return _changed(name, lambda right: replace(right, **values))


def _first_gain(right: Recipe) -> Recipe:
    return replace(right, sources=right.sources[:1] * len(right.sources))


PLAN_MISTAKES: Mapping[str, tuple[str, Callable[[Plan], Plan]]] = {
    "positions from the first row": ("opt", _recipes("positions", rows=torch.arange(64))),
    "partial rotary not reordered": ("phi", _recipes(".attn.", rows=None)),
    "square linear not transposed": ("gpt2", _recipes("attn.o.weight", transposed=False)),
    "gain of one norm not shifted": ("gemma3_text", _recipes("layers.0.attn.q_norm", shift=0.0)),
    "last norm not divided": ("granite", _recipes("final_norm", scale=1.0)),
    "biases of queries, keys, values dropped": ("qwen2", _recipes(".bias", sources=())),
    "one gain for all heads": ("stablelm 12b", _changed("q_norm.weight", _first_gain)),
}


@pytest.mark.parametrize("name", PLAN_MISTAKES)
def test_the_gate_sees_a_mistake_in_a_plan(
    name: str, theirs: Theirs, plan_of: Callable[[Path], Plan], plan_logits: Logits, gate: float
) -> None:
    variant, mistake = PLAN_MISTAKES[name]
    folder, expected = theirs(variant)
    assert _difference(mistake(plan_of(folder)), folder, expected, plan_logits) > 3 * gate


def test_biases_that_no_table_names_are_left_over_and_refused(
    theirs: Theirs, plan_of: Callable[[Path], Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(keys: Keys) -> tuple[str, Family]:
        kind, family = families.read_family(keys)
        return kind, replace(family, biased=frozenset())

    monkeypatch.setattr(plan, "read_family", read)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias \[32\] has no place in the model"):
        plan_of(theirs("qwen2")[0])


def _read_gemma2(keys: Keys) -> Family:
    """What Gemma 2 would be if nobody noticed that its scores are capped."""
    keys.skip("attn_logit_softcapping", "final_logit_softcapping", "rope_local_base_freq")
    changed = {"attn_logit_softcapping": None, "rope_parameters": None}
    family = read_gemma3(Keys({**keys._values, **changed}, "config.json"))
    keys._known.update(keys._values)
    kinds = kinds_by_interval(len(family.layers), 2, SLIDING, FULL)
    turned = rotary_set(None, int(family.config["head_dim"]), 128, theta=10000.0)
    names = {theirs: ours for theirs, ours in family.names.items() if "q_norm" not in theirs and "k_norm" not in theirs}
    return replace(
        family,
        names=names,
        config={**family.config, "qk_norm": "none"},
        layers=tuple((8 if kind == SLIDING else None, turned) for kind in kinds),
    )


def test_scores_that_are_capped_are_seen_and_refused(
    theirs: Theirs,
    plan_of: Callable[[Path], Plan],
    plan_logits: Logits,
    gate: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, expected = theirs("gemma2")
    with pytest.raises(UnsupportedError, match="caps scores"):
        plan_of(folder)
    monkeypatch.setattr(families, "FAMILIES", {**families.FAMILIES, "gemma2": _read_gemma2})
    assert _difference(plan_of(folder), folder, expected, plan_logits) > 3 * gate
    loose, uncapped = theirs("gemma2 uncapped")
    assert _difference(plan_of(loose), loose, uncapped, plan_logits) <= gate


def test_no_fold_is_the_right_fold_where_nothing_is_to_be_folded(
    theirs: Theirs, plan_of: Callable[[Path], Plan]
) -> None:
    made = plan_of(theirs("llama")[0])
    assert not any(recipe.folded for recipe in made.recipes.values())
    assert Folds() == Folds(gain=0.0, embedding=1.0, logits=1.0, branch=1.0)
