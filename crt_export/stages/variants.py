"""Graph variants: which graphs a target is made of, and where they were written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from crt_export.config import ModelConfig
from crt_export.graph.passes.decompose_attention import attention_form
from crt_export.profile import EngineProfile, cache_dtype
from crt_export.spec import graph_names


@dataclass(frozen=True, order=True)
class GraphVariant:
    """Which graph: the same model function in one precision, with its passes and residual stream chosen.

    Attributes:
        target: The target that it is rewritten for; empty where it is shared.
        capacity: Cache length that it is fixed to; 0 where that is open.
        attention: ``fused`` or ``decomposed``.
    """

    graph: str
    precision: str
    unroll: int
    residual_dtype: str
    target: str = ""
    capacity: int = 0
    attention: str = "fused"

    def shared(self, precision: str) -> GraphVariant:
        """What it is rewritten from, in this precision or another one."""
        return GraphVariant(self.graph, precision, self.unroll, self.residual_dtype)

    @property
    def cache_dtype(self) -> str:
        """The dtype of its caches."""
        return cache_dtype(self.precision)

    def filename(self, config: ModelConfig) -> str:
        """``prefill.fp32.onnx``; what differs from the checkpoint's and precision's default is spelled out."""
        if self.target:
            return f"{self.graph}.{self.target}.onnx"
        passes = "" if self.graph != "prefill" or self.unroll == _default_unroll(config) else f"-k{self.unroll}"
        half = self.precision in ("fp16", "w8a8")
        residual = "-residual32" if half and self.residual_dtype == "float32" else ""
        return f"{self.graph}{passes}{residual}.{self.precision}.onnx"


@dataclass(frozen=True, kw_only=True)
class GraphFile:
    """A written graph.

    Attributes:
        variant: What it is.
        file: Its path in the bundle, as is ``weights``.
        sha256: Of the file, lower-case hex; ``weights_sha256`` likewise.
        quantized_matmuls: MatMuls whose weight is INT8.
    """

    variant: GraphVariant
    file: str
    sha256: str
    weights: str
    weights_sha256: str
    quantized_matmuls: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; :meth:`from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GraphFile:
        """Read what to_dict wrote."""
        return cls(**{**values, "variant": GraphVariant(**values["variant"])})


def variants_of_profile(profile: EngineProfile, config: ModelConfig) -> dict[str, GraphVariant]:
    """The graphs one target is made of, by name.

    Raises:
        UnsupportedError: The profile insists on fused attention, and there is no kernel.
    """
    unroll, attention = profile.unroll or 1, attention_form(profile, config.carried)
    shared = {
        name: GraphVariant(name, profile.precision, unroll if name == "prefill" else 1, profile.residual_dtype)
        for name in graph_names(config.carried)
    }
    if not profile.compiled:
        return shared
    own = {"target": profile.name, "capacity": profile.capacity, "attention": attention}
    return {name: variant if name == "head" else replace(variant, **own) for name, variant in shared.items()}


def _default_unroll(config: ModelConfig) -> int:
    return config.carried.passes
