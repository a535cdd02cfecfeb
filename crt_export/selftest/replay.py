"""Feed the tokens of the vectors to a session, through its public calls only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from crt_export.runtime.session import Session
from crt_export.selftest.vectors import Vectors

_CACHES = "past_key_values."


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """How the prompt is fed; steps follow.

    Attributes:
        by: ``step`` (token by token), ``prefill`` (the unrolled graph) or ``prefill_pass`` (as many single passes as
            the prompt has tokens, which is the exact recurrence).
        chunk: Most tokens per call of ``prefill``.
        passes: Those that ``prefill`` was built with; None for a plain transformer.
        steps: Steps after the prompt.
    """

    by: Literal["step", "prefill", "prefill_pass"]
    chunk: int
    passes: int | None
    steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Observed:
    """What a session holds after the prompt (index 0) or a step.

    Attributes:
        index: 0 after the prompt, i after step i.
        logits: float32 [vocab].
        next_token: The engine's argmax.
        state: float32 [hidden]; None for a plain transformer.
        caches: ``past_key_values.{layer}.key|value``, [heads, tokens so far, head_dim].
    """

    index: int
    logits: np.ndarray
    next_token: int
    state: np.ndarray | None
    caches: Mapping[str, np.ndarray]


def replay(session: Session, vectors: Vectors, feeding: Feeding) -> Iterator[Observed]:
    """Run a session of one row from its start, looking at it after the prompt and after every step.

    Raises:
        CrtExportError: What prefill(), step() and snapshot() raise.
    """
    ids = vectors.input_ids
    prompt, rest = ids[: vectors.prompt], ids[vectors.prompt : vectors.prompt + feeding.steps]
    logits = np.empty(0)
    if feeding.by == "step":
        for token in prompt:
            logits = session.step([int(token)])
    elif feeding.by == "prefill":
        logits = session.prefill([prompt], chunk=feeding.chunk, passes=feeding.passes)
    else:
        # Chunks need as many passes as they have tokens.
        passes = min(len(prompt), feeding.chunk)
        logits = session.prefill([prompt], chunk=feeding.chunk, passes=passes)
    yield _observed(session, 0, logits)
    for index, token in enumerate(rest, start=1):
        yield _observed(session, index, session.step([int(token)]))


def _observed(session: Session, index: int, logits: np.ndarray) -> Observed:
    tensors = session.snapshot().tensors
    return Observed(
        index=index,
        logits=logits[0],
        next_token=int(tensors["next_tokens"][0]),
        state=tensors["state"][0, 0] if "state" in tensors else None,
        caches={name: values[0] for name, values in tensors.items() if name.startswith(_CACHES)},
    )
