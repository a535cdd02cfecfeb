"""Pass: initializers that hold parameters and tables carry their checkpoint names."""

from __future__ import annotations

import onnx_ir as ir
from torch import nn

from crt_export.errors import BuildError


def name_weights(graph: ir.Model, model: nn.Module) -> None:
    """Strip the wrapper's ``model.`` prefix from every initializer.

    Requires: the graph was exported from a wrapper that holds the model as ``model``.
    Ensures: every initializer that is a parameter or table of the model has its name there.

    Raises:
        BuildError: A parameter appears under a foreign name.
    """
    prefix = "model."
    known = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    for value in list(graph.graph.initializers.values()):
        assert value.name is not None
        if value.name.startswith(prefix):
            value.name = value.name.removeprefix(prefix)
    missing = [name for name in graph.graph.initializers if "." in name and name not in known]
    if missing:
        raise BuildError(f"graph {graph.graph.name}: initializers under foreign names: {', '.join(missing)}")
