"""The plan of a conversion: our configuration and a recipe for each of its tensors; every tensor of the source is used.

Making a plan reads headers and small files alone, and refuses whatever is to be refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crt_export.config import ModelConfig
from crt_export.convert.families import read_family
from crt_export.convert.family import LAYER, NORMS, Family, Fused
from crt_export.convert.fold import Recipe, block_rows, group_rows, half_order
from crt_export.convert.folder import DTYPES, Source, StoredTensor
from crt_export.convert.keys import Keys
from crt_export.errors import CheckpointError, UnsupportedError, problem_list
from crt_export.models.declaration import HALF
from crt_export.models.registry import tensor_shapes
from crt_export.models.transformer import TransformerConfig

_MOST_SHOWN = 20
#: Zeros for biases, gains of norms for each head, a head that is untied: no more than that is added.
_MOST_TIMES, _SLACK = 3, 1_000_000
_LAYER = re.compile(r"layers\.([0-9]+)\.(.*)")
_QUERY_KEY = ("attn.q", "attn.k", "attn.q_norm", "attn.k_norm")
#: Standard deviation of W1 in a new correction, as of a new model's weights.
_DEVIATION, _SEED = 0.02, 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion will write.

    Attributes:
        family: ``model_type`` of the source.
        config: Of the checkpoint, its tokens and tokenizer still left out.
        recipes: For each of its tensors.
    """

    family: str
    config: TransformerConfig
    recipes: Mapping[str, Recipe]


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What turns a transformer into a CRT.

    Attributes:
        size: Its width G; None for 4 times the hidden size.
        passes: ``unroll_steps``.
    """

    size: int | None
    passes: int


def plan_conversion(source: Source, correction: Correction | None, max_positions: int | None = None) -> Plan:
    """Plan the conversion of a source.

    Args:
        source: What is converted.
        correction: None for a plain transformer.
        max_positions: Positions of the checkpoint, at most those of the source; None for all of them.

    Raises:
        CheckpointError: A key or a tensor is missing, or is not what the others ask for.
        UnsupportedError: Something has no equal here, or is not known.
    """
    keys = Keys(source.config, "config.json")
    try:
        kind, family = read_family(keys)
        tied = keys.flag("tie_word_embeddings", bool(family.config["tie_word_embeddings"]))
        keys.finish()
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{source.path}: {error}") from None
    table = _Table(source, family, tied)
    tied = tied and not table.has_other_head()
    try:
        config = _config(family, tied, correction, max_positions)
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{source.path}: {error}") from None
    shapes = _shapes(source, config)
    recipes = {name: table.recipe(config, name, shape) for name, shape in shapes.items()}
    table.check()
    return Plan(family=kind, config=config, recipes=recipes)


def _config(family: Family, tied: bool, correction: Correction | None, most: int | None) -> TransformerConfig:
    positions = min(family.positions, most or family.positions)
    values: dict[str, Any] = {
        **family.config,
        **_attention(family),
        "model_type": "transformer",
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "tokenizer": "none",
        "biases": bool(family.biased - NORMS),
    }
    if correction is not None:
        size = correction.size or 4 * int(values["hidden_size"])
        values |= {"model_type": "context_ready_transformer", "correction_intermediate_size": size}
        values |= {"unroll_steps": correction.passes}
    config = ModelConfig.from_dict(values)
    assert isinstance(config, TransformerConfig)
    return config


def _shapes(source: Source, config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the checkpoint's tensors, once the sizes are known to be of the order of the source's."""
    stored = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    try:
        shapes = tensor_shapes(config)
    except RuntimeError:  # more bytes than 64 bits count
        shapes = {}
    own = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("correction."))
    if not shapes or own > _MOST_TIMES * stored + _SLACK:
        raise CheckpointError(
            f"{source.path}: config.json describes a model of {own:,} parameters or more, its weights are {stored:,}"
        )
    return shapes


def _attention(family: Family) -> dict[str, Any]:
    """The keys about windows and rotary sets."""
    sets = list(dict.fromkeys(rotary for _, rotary in family.layers if rotary is not None))
    pattern = [(window, None if rotary is None else sets.index(rotary)) for window, rotary in family.layers]
    period = next(
        n for n in range(1, len(pattern) + 1) if all(pattern[i] == pattern[i % n] for i in range(len(pattern)))
    )
    values: dict[str, Any] = {"rope_frequencies": [list(rotary.frequencies) for rotary in sets]} if sets else {}
    if period == 1 and pattern[0][1] == (0 if sets else None):
        return {**values, **({} if pattern[0][0] is None else {"sliding_window": pattern[0][0]})}
    return {**values, "layer_attention": [list(pair) for pair in pattern[:period]]}


class _Table:
    """Tensors of a source by our names, and which of them are used."""

    def __init__(self, source: Source, family: Family, tied: bool) -> None:
        self._source, self._family, self._said_tied = source, family, tied
        self._stored = source.tensors
        self._theirs: dict[str, tuple[list[str], Fused | None]] = {}
        for theirs, ours in family.names.items():
            fused = ours if isinstance(ours, Fused) else None
            several = ours.parts if isinstance(ours, Fused) else ours
            for name in (several,) if isinstance(several, str) else several:
                self._theirs.setdefault(name, ([], fused))[0].append(theirs)
        self._prefix = self._find_prefix()
        self._used: set[str] = set()
        self._problems: list[str] = []

    def _find_prefix(self) -> str:
        embed = self._theirs["embed"][0][0]
        for prefix in self._family.prefixes:
            if f"{prefix}{embed}.weight" in self._stored:
                return prefix
        return self._family.prefixes[0]

    def has_other_head(self) -> bool:
        """Whether a head that is said to be tied has weights, or a bias, of its own."""
        weight = self._name("lm_head", 0, "weight")
        embed = self._name("embed", 0, "weight")
        if f"{weight.removesuffix('weight')}bias" in self._stored:
            return True
        if weight not in self._stored or embed not in self._stored:
            return False
        if self._source.same(weight, embed):
            self._used.add(weight)
            return False
        return True

    def _name(self, module: str, layer: int, kind: str) -> str:
        """Their name of a tensor of ours; of several that it may have, the one that is there."""
        names = [theirs.replace("{i}", str(layer)) for theirs in self._theirs[module][0]]
        full = [f"{'' if module == 'lm_head' else self._prefix}{name}.{kind}" for name in names]
        return next((name for name in full if name in self._stored), full[0])

    def recipe(self, config: TransformerConfig, name: str, shape: tuple[int, ...]) -> Recipe:
        """How one tensor of ours is made."""
        module, _, kind = name.rpartition(".")
        match = _LAYER.fullmatch(module)
        layer, module = (int(match[1]), match[2]) if match else (0, module)
        key = f"{LAYER}{module}" if match else module
        if module.startswith("correction."):
            return _new_correction(name, shape)
        if kind == "bias" and module not in self._family.biased:
            return Recipe(shape=shape)
        if module in self._family.bare:
            return Recipe(shape=shape, fill=1.0 if kind == "weight" else 0.0)
        source = self._name(key, layer, kind)
        if name == "lm_head.weight" and self._said_tied and source not in self._stored:
            source = self._name("embed", 0, "weight")  # its bias alone unties it
        made = self._picked(config, key, layer, shape, source)
        sources = made.sources
        self._used.update(sources)
        self._problems += [problem for one in sources if (problem := self._problem(one, made)) is not None]
        return made

    def _picked(self, config: TransformerConfig, key: str, layer: int, shape: tuple[int, ...], source: str) -> Recipe:
        """Rows, order and arithmetic of one tensor."""
        folds, module = self._family.folds, key.removeprefix(LAYER)
        rows, whole = self._rows(config, key, shape)
        turned = self._family.layers[layer][1] if module in _QUERY_KEY else None
        sources, flat, source_shape = (source,), False, whole
        if module.endswith(("q_norm", "k_norm")):
            sources, source_shape, rows, flat = self._per_head(config, module, shape, source)
        if turned is not None and turned.channels < config.head_dim and config.rope_layout == HALF:
            order = half_order(config.head_dim, turned.channels)
            heads = config.num_attention_heads if module.startswith("attn.q") else config.num_key_value_heads
            every = (torch.arange(heads)[:, None] * config.head_dim + order).flatten()
            rows = every if rows is None else rows[every]
        if module == "positions":
            source_shape = (self._family.positions + folds.position_offset, shape[1])
            first = folds.position_offset
            rows = None if source_shape == shape else torch.arange(first, first + shape[0])
        linear = len(shape) == 2 and module.startswith(("attn.", "mlp.")) and not flat
        transposed = folds.transposed and linear
        return Recipe(
            shape=shape,
            sources=sources,
            source_shape=source_shape[::-1] if transposed else source_shape,
            rows=rows,
            transposed=transposed,
            flat=flat,
            scale=self._scale(config, module, layer, rows),
            shift=folds.gain if source.endswith("weight") and "norm" in module else 0.0,
        )

    def _rows(
        self, config: TransformerConfig, key: str, shape: tuple[int, ...]
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """Rows of a fused tensor, and the shape of all of it."""
        fused = self._theirs[key][1]
        if fused is None:
            return None, shape
        index = fused.parts.index(key)
        queries, values = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        parts = (queries, values, values) if len(fused.parts) == 3 else (config.intermediate_size,) * 2
        whole = (sum(parts), *shape[1:])
        if not fused.grouped:
            return block_rows(parts, index), whole
        groups = config.num_key_value_heads
        return group_rows(groups, config.num_attention_heads // groups, config.head_dim, index), whole

    def _per_head(
        self, config: TransformerConfig, module: str, shape: tuple[int, ...], source: str
    ) -> tuple[tuple[str, ...], tuple[int, ...], Tensor | None, bool]:
        """Sources of the gain of queries or keys: one for all heads, one for each, or all of them in one."""
        if config.qk_norm == "full":
            return (source,), shape, None, False
        if module in self._family.per_head:
            stem, kind = source.rsplit(".", 1)
            return tuple(f"{stem}.{head}.{kind}" for head in range(shape[0])), (shape[1],), None, True
        if self._stored.get(source, _NOTHING).shape == shape:
            return (source,), shape, None, True
        return (source,), (shape[1],), torch.arange(shape[1]).repeat(shape[0]), True

    def _scale(self, config: TransformerConfig, module: str, layer: int, rows: Tensor | None) -> float | Tensor:
        folds = self._family.folds
        if module == "embed":
            return folds.embedding
        if module == "final_norm":
            return folds.logits / (folds.embedding if config.tie_word_embeddings else 1.0)
        if module in ("attn.o", "mlp.down"):
            return folds.branch
        # a norm would undo what stands before it
        if module != ("attn.q" if config.qk_norm == "none" else "attn.q_norm"):
            return 1.0
        factor = folds.query[layer] if folds.query else 1.0
        turned = self._family.layers[layer][1]
        if turned is None or turned.factor == 1.0:
            return factor
        # cosine and sine of queries and keys alike are multiplied, so that their product is twice
        channels = torch.tensor([turned.factor**2 if frequency else 1.0 for frequency in turned.frequencies])
        head = channels.repeat(2) if config.rope_layout == HALF else channels.repeat_interleave(2)
        return (head * factor).repeat(config.num_attention_heads)

    def _problem(self, name: str, made: Recipe) -> str | None:
        stored = self._stored.get(name)
        if stored is None:
            return f"missing tensor {name} {list(made.source_shape)}"
        if stored.shape != made.source_shape:
            return f"tensor {name} has shape {list(stored.shape)}, config.json asks for {list(made.source_shape)}"
        if stored.dtype not in DTYPES.values():
            kind = str(stored.dtype).removeprefix("torch.")
            return f"tensor {name} has dtype {kind}, expected one of {', '.join(DTYPES)}"
        return None

    def check(self) -> None:
        """Refuse a source whose tensors are not those that its configuration asks for, all of them at once.

        Raises:
            CheckpointError: Some are missing, misshapen, or left over.
        """
        left = [
            name for name, stored in self._stored.items() if name not in self._used and not _is_no_weight(name, stored)
        ]
        problems = list(dict.fromkeys(self._problems))
        problems += [
            f"tensor {name} {list(self._stored[name].shape)} has no place in the model" for name in sorted(left)
        ]
        if problems:
            more = [f"and {len(problems) - _MOST_SHOWN} more"] if len(problems) > _MOST_SHOWN else []
            where = f"{self._source.path}: the weights are not those of its config.json"
            raise CheckpointError(problem_list(where, [*problems[:_MOST_SHOWN], *more]))


_NOTHING = StoredTensor(shape=(), dtype=torch.float32, file=None)  # type: ignore[arg-type]


def _is_no_weight(name: str, stored: StoredTensor) -> bool:
    """Masks and tables that old files hold: a mask has 4 dims, while ``attn.bias`` may be a weight as well."""
    if name.endswith((".attn.bias", ".attention.bias")):
        return len(stored.shape) == 4
    return name.endswith(("rotary_emb.inv_freq", ".masked_bias"))


def _new_correction(name: str, shape: tuple[int, ...]) -> Recipe:
    """Nothing is added as long as W2 and b2 are 0; W1 is what the first steps of training go through."""
    if name == "correction.up.weight":
        generator = torch.Generator().manual_seed(_SEED)
        return Recipe(
            shape=shape, start=lambda: torch.randn(shape, generator=generator.manual_seed(_SEED)) * _DEVIATION
        )
    return Recipe(shape=shape, fill=1.0 if name == "correction.norm.weight" else 0.0)


def tensors_of(plan: Plan, source: Source) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a plan, whole."""
    for name, recipe in plan.recipes.items():
        yield name, recipe.tensor(source.read)
