"""From a prompt to streamed text: tokenizer, session and generation put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crt_export.errors import InputError
from crt_export.runtime.bundle import Bundle
from crt_export.runtime.generate import GenerationOptions


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """How a text generation ended.

    Attributes:
        text: Everything that was streamed.
        token_ids: The new tokens.
        prompt_tokens: Tokens of the prompt.
        stop_reason: ``max_new_tokens`` or ``stop_token``.
        target: The target it ran on.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    stop_reason: str
    target: str

    @property
    def new_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.token_ids)


class TextGeneration(Iterator[str]):
    """Pieces of whole UTF-8 characters, as soon as they are complete; ``result`` follows the last one."""

    def __init__(self, pieces: Iterator[str]) -> None:
        """Wrap the generator that does the work."""
        self._pieces = pieces
        self._result: TextResult | None = None

    def __next__(self) -> str:
        """The next piece, never empty."""
        return next(self._pieces)

    @property
    def result(self) -> TextResult:
        """What came out in the end.

        Raises:
            InputError: The text has not been read to its end.
        """
        if self._result is None:
            raise InputError("the generation has not ended; read it to its end first")
        return self._result

    def _end(self, result: TextResult) -> None:
        self._result = result


def generate_text(
    bundle: Bundle, prompt: str, options: GenerationOptions | None = None, *, target: str = ""
) -> TextGeneration:
    """Continue a prompt.

    Args:
        bundle: An open bundle whose model has a tokenizer.
        prompt: The text to continue, not empty.
        options: How many tokens and how they are chosen; greedy by default.
        target: Where to run; empty takes ``bundle.default_target()``.

    Returns:
        An iterator over text; the model runs as it is read.

    Raises:
        InputError: Empty prompt, a model without tokenizer, an unknown target, or prompt and new tokens
            beyond the target's capacity.
        CrtExportError: What ``bundle.session()`` raises.
    """
    chosen = options if options is not None else GenerationOptions()
    if not prompt:
        raise InputError("empty prompt: give at least one character to continue")
    ids = bundle.tokenizer.encode_prompt(prompt)
    name = target or bundle.default_target()
    limit = bundle.target(name).capacity
    needed = len(ids) + chosen.max_new_tokens
    if needed > limit:
        raise InputError(
            f"the prompt has {len(ids)} tokens; with {chosen.max_new_tokens} new ones that exceeds the "
            f"capacity of {limit} of {name}: shorten the prompt, ask for fewer tokens, "
            "or build with a larger --capacity"
        )
    # A session only as large as this text: attention costs by capacity, not by length.
    session = bundle.session(name, capacity=needed)
    generation = session.generate([ids], chosen)

    def pieces() -> Iterator[str]:
        shown: list[str] = []
        stream = bundle.tokenizer.stream()
        with session:
            for (token,) in generation:
                if token is not None and (piece := stream.push(token)):
                    shown.append(piece)
                    yield piece
        if rest := stream.finish():
            shown.append(rest)
            yield rest
        text._end(
            TextResult(
                text="".join(shown),
                token_ids=tuple(generation.tokens[0]),
                prompt_tokens=len(ids),
                stop_reason=generation.stop_reasons[0] or "",
                target=name,
            )
        )

    text = TextGeneration(pieces())
    return text
