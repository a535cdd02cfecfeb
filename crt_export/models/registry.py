"""Every architecture by its ``model_type``, and the way between a checkpoint's tensors and a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from crt_export.config import ModelConfig
from crt_export.errors import UnsupportedError, problem_list
from crt_export.models.base import LanguageModel
from crt_export.models.layers import DeclaresLinears, Linear

if TYPE_CHECKING:
    from crt_export.checkpoint import Checkpoint

#: ``model_type`` to module of this package and class in it.
_ARCHITECTURES = {
    "context_ready_transformer": ("crt", "ContextReadyTransformer"),
    "transformer": ("transformer", "Transformer"),
}
MODEL_TYPES = tuple(_ARCHITECTURES)


def model_class(model_type: str) -> type[LanguageModel]:
    """The class of an architecture."""
    module, name = _ARCHITECTURES[model_type]
    return getattr(import_module(f"crt_export.models.{module}"), name)


def config_class(model_type: str) -> type[ModelConfig]:
    """The class of an architecture's configuration."""
    return model_class(model_type).config_class


@cache
def meta_model(config: ModelConfig) -> LanguageModel:
    """A model whose weights have names and shapes, and no memory; not to be changed."""
    with torch.device("meta"):
        return model_class(config.model_type)(config)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that ``model.safetensors`` must hold, linears as [out, in]."""
    return {name: tuple(tensor.shape) for name, tensor in tensors_from_model(meta_model(config)).items()}


def tables_of(config: ModelConfig) -> dict[str, Tensor]:
    """The tables that no checkpoint stores, float32 by the name of their buffer."""
    with torch.device("meta"):
        model = model_class(config.model_type)(config)
    model.reset_tables()
    return dict(model.named_buffers())


def linear_weights(config: ModelConfig) -> frozenset[str]:
    """Names of the weights of linears, which a checkpoint stores as [out, in] and a model holds as [in, out]."""
    return frozenset(_linear_weights(meta_model(config)))


def linears_of_caches(config: ModelConfig) -> dict[int, tuple[str, str]]:
    """Number of a cache to the names of the linears that compute its keys and its values."""
    found = {}
    for name, module in meta_model(config).named_modules():
        if isinstance(module, DeclaresLinears):
            for index, (key, value) in module.cached.items():
                found[index] = (f"{name}.{key}", f"{name}.{value}")
    return found


def with_positions(checkpoint: Checkpoint, positions: int) -> Checkpoint:
    """The same model for sequences of another length: its tables have that many rows, learned ones at most as many."""
    config = replace(checkpoint.config, max_position_embeddings=positions, training_sequence_length=None)
    shapes = tensor_shapes(config)
    return replace(
        checkpoint,
        config=config,
        tensors={name: tensor[: shapes[name][0]] for name, tensor in checkpoint.tensors.items()},
    )


def model_from_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, residual_dtype: torch.dtype | None = None
) -> LanguageModel:
    """Build the model in evaluation mode, with weights in ``dtype`` and the residual stream in ``residual_dtype``.

    Raises:
        UnsupportedError: A weight does not fit into ``dtype``.
    """
    limit = torch.finfo(dtype).max
    beyond = [
        f"{name}: largest |weight| {float(tensor.abs().max()):.6g}"
        for name, tensor in checkpoint.tensors.items()
        if float(tensor.abs().max()) > limit
    ]
    if beyond:
        where = f"{checkpoint.path}: weights beyond the largest {str(dtype).removeprefix('torch.')} value {limit:g}"
        raise UnsupportedError(problem_list(f"{where} (use an fp32 or w8 target, or rescale them)", beyond))
    with torch.device("meta"):
        model = model_class(checkpoint.config.model_type)(checkpoint.config)
    model.load_state_dict(state_dict_from_tensors(checkpoint.config, checkpoint.tensors), assign=True)
    model.reset_tables()
    model.residual_dtype = dtype if residual_dtype is None else residual_dtype
    return model.to(dtype).eval().requires_grad_(False)


def state_dict_from_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint tensors -> parameters of the model; linears [out, in] become [in, out], a tied head a copy."""
    head = {} if "lm_head.weight" in tensors else {"lm_head.weight": tensors["embed.weight"]}
    linears = _linear_weights(meta_model(config))
    return {
        name: tensor.T.contiguous() if name in linears else tensor.clone()
        for name, tensor in {**tensors, **head}.items()
    }


def tensors_from_model(model: LanguageModel) -> dict[str, Tensor]:
    """The inverse of :func:`state_dict_from_tensors`: what ``model.safetensors`` stores, linears as [out, in]."""
    linears = _linear_weights(model)
    return {
        name: tensor.T.contiguous() if name in linears else tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }


def _linear_weights(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
