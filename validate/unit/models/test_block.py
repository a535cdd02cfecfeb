"""The transformer block in every form that a configuration can ask for: a pass is the steps, and causal to the bit.

What each form computes is held against transformers in validate/convert; here are the invariants, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.models.base import LanguageModel
from crt_export.models.registry import model_from_checkpoint

Tensors = dict[str, torch.Tensor]
SEQ = 12
SETS = [[1.0, 0.5, 0.25], [0.3, 0.1, 0.0]]
FORMS: dict[str, dict[str, Any]] = {
    "llama": {"norm": "rms", "gated_mlp": True, "activation": "silu", "biases": False, "num_key_value_heads": 2},
    "gemma": {
        "norm": "rms",
        "norm_placement": "sandwich",
        "qk_norm": "head",
        "rope_theta": None,
        "rope_frequencies": SETS,
        "layer_attention": [[3, 1], [None, 0]],
        "activation": "gelu_tanh",
        "gated_mlp": True,
    },
    "olmo": {"norm": "rms", "norm_placement": "post", "qk_norm": "full", "num_key_value_heads": 1},
    "neox": {"parallel_residual": True, "rope_theta": None, "rope_frequencies": SETS[1:], "sliding_window": 4},
    "gpt2": {"learned_positions": True, "rope_theta": None, "activation": "relu_squared", "logit_softcap": 3.0},
    "smollm": {"layer_attention": [[None, 0], [5, None]], "activation": "relu"},
}


@pytest.fixture(scope="module")
def built(
    tiny_config: Callable[..., ModelConfig], random_tensors: Callable[..., Tensors]
) -> Callable[..., LanguageModel]:
    """``built(form, model_type)``: a model of one form in float64, heads narrower than hidden_size / heads."""

    def build(form: str, model_type: str) -> LanguageModel:
        config = tiny_config(model_type=model_type, head_dim=6, **FORMS[form])
        checkpoint = Checkpoint(
            path=Path("in-memory"),
            config=config,
            tensors=random_tensors(config, 3),
            stored_dtypes=("F32",),
            sha256="",
        )
        return model_from_checkpoint(checkpoint, torch.float64)

    return build


def _ids(model: LanguageModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (2, SEQ), generator=generator)


@pytest.mark.parametrize("model_type", ["transformer", "context_ready_transformer"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pass_is_the_steps(built: Callable[..., LanguageModel], form: str, model_type: str) -> None:
    model = built(form, model_type)
    ids = _ids(model)
    expected, state = model.sequential(ids)
    found, after, _ = model.unroll(ids, SEQ if model.carried.iterated else 1)
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.keys, state.keys, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(after.states), dict(state.states), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model_type", ["transformer", "context_ready_transformer"])
@pytest.mark.parametrize("form", FORMS)
def test_later_tokens_change_nothing_before_them(
    built: Callable[..., LanguageModel], form: str, model_type: str
) -> None:
    model = built(form, model_type)
    ids = _ids(model)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % model.config.vocab_size
    first, second = (model.head(model.unroll(tokens, 3)[0].hidden) for tokens in (ids, changed))
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.equal(first[:, 7:], second[:, 7:])


@pytest.mark.parametrize("form", FORMS)
def test_the_declaration_is_what_the_caches_are(built: Callable[..., LanguageModel], form: str) -> None:
    model = built(form, "context_ready_transformer")
    _, state, _ = model.unroll(_ids(model), 1)
    for spec, keys, values in zip(model.carried.caches, state.keys, state.values, strict=True):
        assert keys.shape == values.shape == (2, spec.heads, SEQ, spec.head_dim)
    assert {name: values.shape[2:] for name, values in state.states.items()} == {
        spec.name: spec.shape for spec in model.carried.states
    }
