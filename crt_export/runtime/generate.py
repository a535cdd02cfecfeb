"""A generation, token by token: the loop around a session.

A row ends for one of four reasons, looked at in this order for every token it draws:

* ``stop_token``: the token is a stop token, or the special token that a stop string spells. It is not given out and
  not part of the row.
* ``stop_string``: the row's new text contains a stop string. The token counts and is given out; the text ends
  before the stop string.
* ``max_new_tokens``: it was the last token allowed.
* ``callback``: the application said so.

The text of a row goes on from what the row was fed: a space that divides the first word from the prompt belongs to
it, and a character of which the row already holds the first bytes. It comes in whole characters, and what may still
become a stop string is held back.

A stop token ends the text, so what is left comes out (U+FFFD for bytes that never became a character); should a stop
string turn up in it, the text ends before it and the reason is ``stop_string``. Where ``max_new_tokens`` or the
callback ends a row, the text may go on: what is held back then belongs to the session's history and its snapshots. A
generation that goes on without a prompt gives it out as soon as it is certain, so the texts of the parts are the text
of an unbroken generation, and a stop string is found across them. Where nothing follows, ``Generation.rest`` is what is
missing; ``generate_text()`` adds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crt_export.checked import shown
from crt_export.errors import InputError, MissingDependencyError, problem_list
from crt_export.runtime.generation_options import GenerationOptions
from crt_export.runtime.guard import Call
from crt_export.runtime.history import NO_TOKEN
from crt_export.runtime.row_text import RowText
from crt_export.runtime.sampling import sample_token
from crt_export.tokenizer import Tokenizer

if TYPE_CHECKING:
    from crt_export.runtime.session import Session

#: Makes a call that has the session to itself, see Guard.run().
RunAlone = Callable[..., list[int | None]]

MAX_NEW_TOKENS = "max_new_tokens"
STOP_TOKEN = "stop_token"
STOP_STRING = "stop_string"
CALLBACK = "callback"

#: Called with row, token and the text that it completes; ``False`` ends the row, anything else goes on.
TokenCallback = Callable[[int, int | None, str], Any]


class Generation(Iterator[list[int | None]]):
    """Each ``next()`` runs the model once and gives one new token per row, None for a row that has stopped.

    A stopped row is frozen: nothing of it is written any more. The last token given out has not been fed to the
    model; the session remembers it and feeds it first when it goes on. The last list may hold None for every
    row, where a stop token lets out text that was held back. Leave the session alone while its generation is
    being read: a token fed by hand takes the place of the one that was drawn last.

    Where next() is interrupted in the middle of a token, its session is poisoned and the generation refuses to go on;
    interrupted before or after that it goes on as if nothing had been.

    Attributes:
        tokens: The new tokens of every row so far.
        stop_reasons: Per row ``stop_token``, ``stop_string``, ``max_new_tokens`` or ``callback``; None while it
            runs.
        stopped_by: Per row the stop token's id or the stop string that ended it; else None.
        prompt_tokens: Length of every prompt.
        pieces: Per row the text that the last ``next()`` completed.
    """

    def __init__(
        self,
        session: Session,
        run_alone: RunAlone,
        prompts: Sequence[np.ndarray],
        options: GenerationOptions,
        on_token: TokenCallback | None = None,
    ) -> None:
        """Prepare; the model runs when the iterator is read. Applications call ``session.generate()``.

        Args:
            session: The session, whose rows have room for what is to come.
            run_alone: Makes a call of that session.
            prompts: Checked tokens of every row, int64 [length]; a row without any goes on from what the session
                holds.
            options: How many tokens, how they are chosen and where to stop.
            on_token: Called for every new token, after the whole batch has drawn; and with None as token where a
                stop token lets out text that was held back.

        Raises:
            InputError: Stop strings, but a model without tokenizer; or a callback that cannot be called.
            MissingDependencyError: Stop strings need the ``tokenizers`` library, which is not installed.
        """
        if on_token is not None and not callable(on_token):
            raise InputError(f"on_token must be a function of row, token and text, found {shown(on_token)}")
        tokenizer = _tokenizer(session, options)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.stop_reasons: list[str | None] = [None for _ in prompts]
        self.stopped_by: list[int | str | None] = [None for _ in prompts]
        self.prompt_tokens = [len(prompt) for prompt in prompts]
        self.pieces = ["" for _ in prompts]
        self._session = session
        self._run_alone = run_alone
        # Set while tokens, texts and reasons are changed, hence after an interrupt in the middle of that.
        self._torn = False
        self._options = options
        self._on_token = on_token
        self._stops, strings = _stops(session, options, tokenizer)
        self._texts = [RowText(tokenizer, strings) for _ in prompts]
        self._texts_begun = False
        self._prompts: Sequence[np.ndarray] | None = prompts
        # The engine's argmax is the same choice, and saves the way of the logits to the host.
        self._argmax = options.sampling.greedy and not options.sampling.penalises

    @property
    def texts(self) -> list[str]:
        """The new text of every row so far; empty for a model without tokenizer."""
        return [text.text for text in self._texts]

    @property
    def rest(self) -> list[str]:
        """Text of every row that is held back, as if nothing followed; what goes on gives it out itself.

        U+FFFD for bytes that are no character yet; empty where a stop token or a stop string ended the row.
        """
        return [text.rest for text in self._texts]

    def __next__(self) -> list[int | None]:
        """Run the model once and choose a token per row.

        Raises:
            InputError: Closed, poisoned or busy session; or the last next() was interrupted in the middle of a token.
            ContractError: The engine failed or gave values that are not finite. Poisons the session.
        """
        if self._torn:
            raise InputError(
                "this generation was interrupted in the middle of a token and cannot go on; call reset() or restore() "
                "of its session and start another"
            )
        if all(self.stop_reasons):
            raise StopIteration
        given = self._run_alone(self._next_tokens)
        self._torn = False
        self._report(given)
        if all(token is None for token in given) and not any(self.pieces):
            raise StopIteration
        return given

    def _next_tokens(self, call: Call) -> list[int | None]:
        """Feed, draw and take: all of it, or the session is poisoned."""
        drawn = self._draw(self._run(call))
        call.begin()
        self._torn = True
        self._prompts = None
        self._begin_texts()
        self.pieces = ["" for _ in drawn]
        return [None if token is None else self._take(row, token) for row, token in enumerate(drawn)]

    def _run(self, call: Call) -> np.ndarray:
        """Feed what is pending, and the prompts at first; next tokens [batch] or logits [batch, vocab]."""
        pending = [
            None if reason or token == NO_TOKEN else token
            for reason, token in zip(self.stop_reasons, self._session.history.pending.tolist(), strict=True)
        ]
        if self._prompts is None:
            return self._step(call, pending)
        rows = [
            prompt if token is None else np.concatenate(([token], prompt))
            for token, prompt in zip(pending, self._prompts, strict=True)
        ]
        if max(len(row) for row in rows) > 1:
            logits = call.prefill(rows, self._options.passes)
            return call.next_tokens() if self._argmax else logits
        # A step, so that going on gives what an unbroken generation gives, to the last bit.
        return self._step(call, [int(row[0]) if len(row) else None for row in rows])

    def _begin_texts(self) -> None:
        """Once the prompts are fed: what the rows hold now is what their new text goes on from."""
        if self._texts_begun:
            return
        history = self._session.history
        for text, recent, held in zip(self._texts, history.recent.tolist(), history.held.tolist(), strict=True):
            text.go_on(recent, held)
        self._texts_begun = True

    def _step(self, call: Call, tokens: list[int | None]) -> np.ndarray:
        feeds = any(token is not None for token in tokens)
        if self._argmax:
            if feeds:
                call.advance(tokens)
            return call.next_tokens()
        return call.step(tokens) if feeds else call.logits()

    def _draw(self, found: np.ndarray) -> list[int | None]:
        """Choose for every running row before anything is changed: a choice may fail."""
        if self._argmax:
            return [self._found_token(row, token) for row, token in enumerate(found.tolist())]
        return [self._sampled_token(row, logits) for row, logits in enumerate(found)]

    def _found_token(self, row: int, token: int) -> int | None:
        if self.stop_reasons[row]:
            return None
        if token == NO_TOKEN:
            raise _no_token(row)
        return token

    def _sampled_token(self, row: int, logits: np.ndarray) -> int | None:
        if self.stop_reasons[row]:
            return None
        if math.isnan(logits[0]):  # a session gives NaN for a row without tokens only
            raise _no_token(row)
        history, sampling = self._session.history, self._options.sampling
        return sample_token(logits, sampling, row=row, step=int(history.drawn[row]), seen=history.seen[row])

    def _take(self, row: int, token: int) -> int | None:
        """Make a drawn token part of its row, or end the row; the token if it is given out."""
        text = self._texts[row]
        keep = token not in self._stops
        self._session.history.draw(row, token, keep)
        if not keep:
            self.pieces[row] = text.finish()
            self._stop(row, STOP_TOKEN, token)
            return None
        self.tokens[row].append(token)
        self.pieces[row] = text.push(token)
        self._session.history.held[row] = text.held
        if text.stop_string is not None:
            self._stop(row, STOP_STRING, text.stop_string)
        elif len(self.tokens[row]) >= self._options.max_new_tokens:
            self._stop(row, MAX_NEW_TOKENS, None)
        return token

    def _stop(self, row: int, reason: str, what: int | str | None) -> None:
        found = self._texts[row].stop_string
        self.stopped_by[row] = what if found is None else found
        self.stop_reasons[row] = reason if found is None else STOP_STRING  # last: who reads it believes the rest

    def _report(self, given: Sequence[int | None]) -> None:
        if self._on_token is None:
            return
        for row, token in enumerate(given):
            if token is None and not self.pieces[row]:
                continue
            goes_on = self._on_token(row, token, self.pieces[row])
            if goes_on is False and self.stop_reasons[row] is None:
                self.stop_reasons[row] = CALLBACK


def _no_token(row: int) -> InputError:
    return InputError(
        f"row {row} holds no token: its session was reset while a generation was being read; start another generation"
    )


def _stops(
    session: Session, options: GenerationOptions, tokenizer: Tokenizer | None
) -> tuple[frozenset[int], tuple[str, ...]]:
    """The tokens that end a row, and the strings to look for in its text: special tokens give none."""
    special = {text: None if tokenizer is None else tokenizer.special_token_id(text) for text in _texts(options)}
    named = [token for token in options.stop_tokens if isinstance(token, str)]
    wanted = [token for token in options.stop_tokens if isinstance(token, int)]
    vocab = session.history.seen.shape[1]
    problems = [f"token id {token} is outside the vocabulary (0 to {vocab - 1})" for token in wanted if token >= vocab]
    problems += [
        f"{text!r} is no special token of the model's tokenizer; stop_strings finds text"
        for text in named
        if special[text] is None
    ]
    if problems:
        raise InputError(problem_list("stop tokens", problems))
    found = {token for token in special.values() if token is not None}
    ends = () if options.ignore_eos else session.eos_token_ids
    return frozenset({*wanted, *found, *ends}), tuple(text for text in options.stop_strings if special[text] is None)


def _texts(options: GenerationOptions) -> tuple[str, ...]:
    """What only a tokenizer can tell: stop strings, and stop tokens given by their text."""
    return (*options.stop_strings, *(token for token in options.stop_tokens if isinstance(token, str)))


def _tokenizer(session: Session, options: GenerationOptions) -> Tokenizer | None:
    """The session's tokenizer; None where text is not asked for and cannot be had."""
    try:
        tokenizer = session.tokenizer
    except MissingDependencyError:
        if _texts(options):
            raise
        return None
    if tokenizer is None and _texts(options):
        raise InputError(
            "stop strings need text, and this model has no tokenizer (config.json: tokenizer = none); "
            "give the ids of stop_tokens instead"
        )
    return tokenizer
