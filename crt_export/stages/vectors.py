"""Stage: the vectors of the self-test, made by PyTorch FP32 and by nothing that is deployed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crt_export import __version__
from crt_export.bundle import TOOL_NAME
from crt_export.checkpoint import Checkpoint
from crt_export.config import ModelConfig
from crt_export.errors import BuildError, InputError, problem_list
from crt_export.models.base import LanguageModel, Pass, State
from crt_export.models.declaration import STATE
from crt_export.models.registry import model_from_checkpoint
from crt_export.parity.tolerances import load_tolerances
from crt_export.profile import EngineProfile
from crt_export.progress import Progress, no_progress
from crt_export.quantize.plan import W8A8Plan
from crt_export.selftest.vectors import RECURRENCE, VECTORS_FILE, Vectors, divisor_name, prefill_run
from crt_export.text import TokenText, begin_rows, read_text
from crt_export.tokenizer import Tokenizer

#: Longer than the usual number of passes, so that passes and recurrence differ; short enough for ten seconds.
PROMPT_TOKENS = 12
STEPS = 16
#: Columns of logits at the steps between; larger vocabularies are covered over several steps.
_COLUMNS = 4096
_SEED = 0


def write_vectors(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    profiles: Sequence[EngineProfile],
    text: TokenText | None,
    plan: W8A8Plan | None,
    folder: Path,
    progress: Progress = no_progress,
) -> Path:
    """Write ``selftest/vectors.safetensors`` into a bundle's staging folder.

    Args:
        checkpoint: The model.
        tokenizer: Its tokenizer, for the packaged text.
        profiles: Resolved targets: their passes, chunks and capacities.
        text: Validation text of the build; without it the packaged text, and random tokens where that cannot be used.
        plan: Quantisation of w8a8, which scales value caches; None when no target has that precision.
        folder: Staging folder.
        progress: Told that it is done.

    Returns:
        The file.

    Raises:
        BuildError: PyTorch's own values are not finite.
    """
    progress("make the vectors of the self-test", 0, 0)
    vectors = make_vectors(checkpoint, tokenizer, profiles, text, plan)
    file = folder / VECTORS_FILE
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(vectors.to_bytes())
    return file


def make_vectors(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    profiles: Sequence[EngineProfile],
    text: TokenText | None,
    plan: W8A8Plan | None = None,
) -> Vectors:
    """The vectors themselves; arguments and errors as for :func:`write_vectors`."""
    config = checkpoint.config
    tokens = min([PROMPT_TOKENS + STEPS, config.max_position_embeddings, *(p.capacity for p in profiles)])
    # Where fewer tokens fit than are wanted, both parts shrink alike.
    prompt = max(1, tokens * PROMPT_TOKENS // (PROMPT_TOKENS + STEPS))
    ids, source, seed = _tokens(config, tokenizer, text, tokens)
    model = model_from_checkpoint(checkpoint)
    stride = -(-config.vocab_size // _COLUMNS)
    chunks = {(profile.unroll or 1, min(prompt, profile.seq.max)) for profile in profiles}
    tensors = {"input_ids": ids}
    empty = Vectors(
        metadata={
            "generator": f"{TOOL_NAME} {__version__}",
            "torch": str(torch.__version__).partition("+")[0],
            "checkpoint": checkpoint.sha256,
            "ids": source,
            "seed": seed,
            "prompt": str(prompt),
            "steps": str(tokens - prompt),
            "logit_stride": str(stride),
            "limits": json.dumps(selftest_limits(), sort_keys=True, separators=(",", ":")),
        },
        tensors=tensors,
    )
    if plan is not None:
        divisors = plan.value_divisors(config)
        tensors |= {divisor_name("w8a8", layer): values for layer, values in enumerate(divisors)}
    tensors |= _run(model, empty, RECURRENCE, None)
    for unroll, chunk in sorted(chunks):
        tensors |= _run(model, empty, prefill_run(unroll, chunk), (unroll, chunk))
    broken = [name for name, values in tensors.items() if not np.isfinite(values).all()]
    if broken:
        heading = f"PyTorch FP32 gives values that are not finite for the {source} of the self-test"
        raise BuildError(problem_list(heading, broken))
    return empty


def selftest_limits() -> Mapping[str, float]:
    """``selftest_error`` of ``validate/tolerances.toml`` by precision."""
    return {name: tolerance.selftest_error for name, tolerance in load_tolerances().precisions.items()}


def _tokens(
    config: ModelConfig, tokenizer: Tokenizer | None, text: TokenText | None, count: int
) -> tuple[np.ndarray, str, str]:
    """Ids int64 [count] of one sequence, where they are from, and the seed of random ones."""
    ids, source, seed = _ids(config, tokenizer, text, count)
    return begin_rows(ids[None], config.bos_token_id)[0].copy(), source, seed


def _ids(
    config: ModelConfig, tokenizer: Tokenizer | None, text: TokenText | None, count: int
) -> tuple[np.ndarray, str, str]:
    if text is not None and len(text) >= count:
        return text.ids[:count], "validation text", ""
    try:
        packaged = None if tokenizer is None else read_text(config, tokenizer)
    except InputError:  # no tokenizer, or one that gives this text ids without embeddings
        packaged = None
    if packaged is not None and len(packaged) >= count:
        return packaged.ids[:count], "packaged text", ""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(config.vocab_size, (count,), generator=generator).numpy(), "random", str(_SEED)


@torch.no_grad()
def _run(model: LanguageModel, vectors: Vectors, run: str, passes: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """The tensors of one run.

    Args:
        model: Reference model.
        vectors: Tokens and counts.
        run: Its name.
        passes: Number of passes and chunk of the prompt; None for the recurrence.
    """
    prompt, steps = vectors.prompt, vectors.steps
    ids = torch.from_numpy(vectors.input_ids)[None]
    last, state = _prompt(model, ids[:, :prompt], passes)
    hidden, states = last.hidden, last.states
    if steps:
        rest, state = model.sequential(ids[:, prompt:], state)
        hidden = torch.cat([hidden, rest.hidden], dim=1)
        states = {name: torch.cat([values, rest.states[name]], dim=1) for name, values in states.items()}
    logits = model.head(hidden)[0].float()
    best = logits.topk(min(2, logits.shape[-1]), dim=-1).values
    tensors = {
        f"{run}.next_tokens": logits.argmax(dim=-1).numpy(),
        f"{run}.margins": (best[:, 0] - best[:, -1]).numpy(),
        **{f"{run}.logits.{index}": logits[index].numpy()[vectors.columns(index)] for index in range(steps + 1)},
    }
    for spec in model.carried.states:
        tensors[f"{run}.{spec.tensor(STATE)}"] = states[spec.name][0].float().numpy()
    for layer, (keys, values) in enumerate(zip(state.keys, state.values, strict=True)):
        tensors[f"{run}.past_key_values.{layer}.key"] = keys[0].float().numpy()
        tensors[f"{run}.past_key_values.{layer}.value"] = values[0].float().numpy()
    return tensors


def _prompt(model: LanguageModel, ids: Tensor, passes: tuple[int, int] | None) -> tuple[Pass, State]:
    """What the prompt's last token gives, [1, 1, ...], and what decoding continues from."""
    if passes is None:
        done, state = model.sequential(ids)
    else:
        unroll, chunk = passes
        first, *rest = ids.split(chunk, dim=1)
        done, state, _ = model.unroll(first, unroll)
        for piece in rest:
            done, state, _ = model.unroll(piece, unroll, state)
    last = {name: values[:, -1:] for name, values in done.states.items()}
    return Pass(hidden=done.hidden[:, -1:], states=last), state
