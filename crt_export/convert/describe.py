"""Description of a source before it is converted: whether it converts, its size, and what decoding would hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crt_export.convert import open_source
from crt_export.convert.plan import plan_conversion
from crt_export.convert.text import read_text
from crt_export.errors import CheckpointError, InputError, UnsupportedError


def describe(source: Path, capacity: int) -> dict[str, Any]:
    """Look at a Hugging Face folder or a GGUF file.

    Args:
        source: It.
        capacity: Tokens of the caches.

    Returns:
        JSON-ready values: ``model_type``; ``converts`` and, if not, the ``reason``; else ``parameters`` and bytes of
        its state and of its caches per row.

    Raises:
        InputError: The capacity is below 1.
        CheckpointError: There is nothing of that kind.
        UnsupportedError: Nothing of it can be read.
    """
    if capacity < 1:
        raise InputError(f"capacity must be at least 1, found {capacity}")
    opened = open_source(source)
    document: dict[str, Any] = {
        "kind": "gguf file" if source.is_file() else "hugging face folder",
        "path": str(source),
        "model_type": opened.config.get("model_type"),
        "converts": False,
        "reason": None,
    }
    try:
        plan = plan_conversion(opened, None)
        text = read_text(opened, plan.config.vocab_size)
    except (CheckpointError, UnsupportedError) as error:
        return {**document, "reason": str(error)}
    stored = [opened.tensors[name] for recipe in plan.recipes.values() for name in recipe.sources]
    return {
        **document,
        "converts": True,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored}),
        "parameters": plan.config.parameter_count,
        "positions": plan.config.max_position_embeddings,
        "tokenizer": text.keys["tokenizer"],
        "notes": list(text.notes),
        "capacity": capacity,
        **plan.config.carried.row_bytes(capacity),
        "state_bytes": 4 * plan.config.hidden_size,  # of a CRT made of it
    }
