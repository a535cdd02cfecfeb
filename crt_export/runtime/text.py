"""Streamed text from a prompt: tokenizer, session and generation put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from crt_export.checked import shown
from crt_export.errors import InputError
from crt_export.runtime.bundle import Bundle
from crt_export.runtime.generate import CALLBACK, Generation, TokenCallback
from crt_export.runtime.generation_options import GenerationOptions, checked_options
from crt_export.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """How a text generation ended.

    Attributes:
        text: Everything that was streamed.
        token_ids: The new tokens, those of a stop string included.
        prompt_tokens: Tokens of the prompt.
        stop_reason: ``stop_token``, ``stop_string``, ``max_new_tokens`` or ``callback``, see generate.py.
        stopped_by: The id of the stop token, or the stop string; None for the other reasons.
        target: The target it ran on.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    stop_reason: str
    stopped_by: int | str | None
    target: str

    @property
    def new_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.token_ids)


class TextGeneration(Iterator[str]):
    """Pieces of whole UTF-8 characters, as soon as they are certain; ``result`` follows the last one.

    What may still become a stop string is held back until the end. Prompt and pieces together are what
    ``bundle.tokenizer.decode()`` makes of all tokens, up to a stop string. Memory is released at the end, by
    ``close()``, or with the bundle.
    """

    def __init__(self, session: Session, generation: Generation, on_token: TokenCallback | None = None) -> None:
        """Wrap a generation of one row and the session that it owns; applications call ``generate_text()``."""
        self._session = session
        self._generation = generation
        self._on_token = on_token
        self._broken = ""

    def __next__(self) -> str:
        """The next piece, never empty."""
        try:
            while True:
                next(self._generation)
                if piece := self._generation.pieces[0] + self._last_rest():
                    return piece
        except StopIteration:
            self.close()
            raise
        except BaseException as error:  # a failure or an interrupt: nobody reads on
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._broken = self._broken or f"failed ({text})"
            self.close()
            raise

    @property
    def result(self) -> TextResult:
        """What came out in the end.

        Raises:
            InputError: The text has not been read to its end, or never will be: it failed or was closed.
        """
        reason = self._generation.stop_reasons[0]
        if reason is None and self._broken:
            raise InputError(
                f"the generation {self._broken} before its end and has no result; start another with generate_text()"
            )
        if reason is None:
            raise InputError("the generation has not ended; read it to its end first")
        return TextResult(
            text=self._generation.texts[0] + self._generation.rest[0],
            token_ids=tuple(self._generation.tokens[0]),
            prompt_tokens=self._generation.prompt_tokens[0],
            stop_reason=reason,
            stopped_by=self._generation.stopped_by[0],
            target=self._session.target,
        )

    def close(self) -> None:
        """Release the session without reading on; closing twice is harmless."""
        self._broken = self._broken or "was closed"
        self._session.close()

    def _last_rest(self) -> str:
        """What is held back when the row has ended: nothing follows that could change it."""
        reason = self._generation.stop_reasons[0]
        rest = "" if reason is None else self._generation.rest[0]
        if rest and self._on_token is not None and reason != CALLBACK:
            self._on_token(0, None, rest)
        return rest


def generate_text(
    bundle: Bundle,
    prompt: str,
    options: GenerationOptions | None = None,
    *,
    target: str = "",
    on_token: TokenCallback | None = None,
    parse_special: bool = True,
) -> TextGeneration:
    """Continue a prompt.

    Args:
        bundle: An open bundle whose model has a tokenizer.
        prompt: The text to continue, not empty.
        options: How many tokens, how they are chosen and where to stop; greedy by default.
        target: Where to run; empty takes ``bundle.default_target()``.
        on_token: Called with row 0, every new token and the text that it completes; ``False`` ends the text. The token
            is None where text comes out that was held back until the end.
        parse_special: Whether prompt text that spells a special token becomes that token; False for what strangers
            write, who could otherwise end a turn or begin a sequence.

    Returns:
        An iterator over text; the model runs as it is read.

    Raises:
        InputError: Empty prompt, a model without tokenizer, an unknown target, or prompt and new tokens
            beyond the target's capacity.
        CrtExportError: What ``bundle.session()`` raises.
    """
    chosen = checked_options(options)
    for name, text in (("prompt", prompt), ("target", target)):
        if not isinstance(text, str):
            raise InputError(f"{name} must be text, found {shown(text)}")
    if not prompt:
        raise InputError("empty prompt: give at least one character to continue")
    ids = bundle.tokenizer.encode_prompt(prompt, parse_special=parse_special)
    name = target or bundle.default_target()
    built = bundle.target(name)
    limit = built.capacity
    needed = len(ids) + chosen.max_new_tokens
    if needed > limit:
        raise InputError(
            f"the prompt has {len(ids)} tokens; with {chosen.max_new_tokens} new ones that exceeds the "
            f"capacity of {limit} of {name}: shorten the prompt, ask for fewer tokens, "
            "or build with a larger --capacity"
        )
    # A session only as large as this text: attention costs by capacity, not by length. A compiled engine has one
    # capacity.
    session = bundle.session(name, capacity=None if built.profile.compiled else needed)
    with ExitStack() as undo:
        undo.callback(session.close)
        generation = TextGeneration(session, session.generate([ids], chosen, on_token=on_token), on_token)
        undo.pop_all()  # from here on the generation closes its session
    return generation
