"""A running model: prefill and step over a batch of rows, each with its own length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np

from crt_export.runtime.decoder import Decoder
from crt_export.runtime.generate import Generation, TokenCallback
from crt_export.runtime.generation_options import GenerationOptions, checked_options
from crt_export.runtime.guard import Call, Guard
from crt_export.runtime.history import NO_TOKEN, History
from crt_export.runtime.rows import continuing_rows
from crt_export.runtime.snapshot import Snapshot, check_snapshot
from crt_export.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """What a session knows of its bundle and of the model in it.

    Attributes:
        bundle: Identity of the bundle.
        target: Name of the target.
        eos_token_ids: The tokens that end a sequence; empty if the model has none.
        tokenizer: Gives the bundle's tokenizer, or None if the model has none.
        reopen: Opens another session of the same kind.
    """

    bundle: str
    target: str
    eos_token_ids: tuple[int, ...]
    tokenizer: Callable[[], Tokenizer | None]
    reopen: Callable[[], Session]


class Session:
    """One batch of sequences on one target.

    Rows never influence each other: each has its own position, and the chunks its tokens go through depend on
    its own tokens only. A call that is refused (InputError, BundleError, UnsupportedError) changes nothing. A
    call that fails, or gives a value that is not finite, poisons the session: every further call is refused
    until reset() or restore(). So does one that an exception ends from outside (Ctrl-C, a signal handler's, another
    thread's), unless it came before the first change.

    A session serves one thread at a time: a call while another one runs is refused. Sessions of one bundle
    may run in different threads; they share weights and threads, and nothing else.

    Attributes:
        target: Name of the target.
        batch: Number of rows.
        capacity: Most tokens a row can hold.
        vocab_size: Number of logits per row.
        eos_token_ids: The tokens that end a sequence; empty if the model has none.
        history: Draws, pending and seen tokens of the rows, and what their text goes on from. What is fed by prefill(),
            step() or advance() is seen, and takes the place of a pending token.
    """

    def __init__(self, decoder: Decoder, info: SessionInfo) -> None:
        """Take over a decoder; applications call ``bundle.session()``."""
        sizes = decoder.sizes
        self.target = info.target
        self.batch = sizes.batch
        self.capacity = sizes.capacity
        self.vocab_size = sizes.vocab
        self.eos_token_ids = info.eos_token_ids
        self.history = History(sizes.batch, sizes.vocab)
        self._info = info
        self._guard = Guard(decoder, self.history)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, read on first use; None if the model has none.

        Raises:
            MissingDependencyError: It needs the ``tokenizers`` library, which is not installed.
            BundleError: Its file is missing or differs from what was built.
        """
        return self._info.tokenizer()

    @property
    def position(self) -> np.ndarray:
        """Tokens in the cache of each row, int64 [batch], a copy; an eviction makes it smaller."""
        return np.array(self._guard.decoder.position, np.int64)

    @property
    def logits(self) -> np.ndarray:
        """Logits after each row's last token, float32 [batch, vocab], a copy; NaN for a row without tokens.

        Raises:
            ContractError: They are not finite, which advance() could not see. Poisons the session.
        """
        return self._guard.run(Call.logits)

    @property
    def next_tokens(self) -> np.ndarray:
        """The engine's likeliest token after each row's last one, int64 [batch]; -1 for a row without tokens."""
        return self._guard.run(Call.next_tokens)

    def prefill(
        self,
        rows: Sequence[Sequence[int] | np.ndarray],
        *,
        passes: int | Literal["adaptive", "exact"] | None = None,
        chunk: int | None = None,
    ) -> np.ndarray:
        """Append tokens to every row, token by token or in parallel passes.

        Args:
            rows: Token ids per row; rows may differ in length, and an empty row stays as it is.
            passes: ``"exact"`` feeds token by token, as step() would. A number makes that many parallel passes over
                every chunk (as many as the chunk has tokens give the result of step by step). ``"adaptive"`` makes
                passes until their residual is below the target's bound, row by row, and where the target's most
                passes do not get there feeds the rest of the chunk token by token. None is the target's own choice,
                ``prefill`` of its entry in the manifest.
            chunk: Most tokens per call of the engine; None takes that of the target's choice, and its limit for a
                number of passes.

        Returns:
            Logits after each row's last token, float32 [batch, vocab], a copy. An empty row keeps those of
            its last call; NaN if it never had a token.

        Raises:
            InputError: Closed, poisoned or busy session, wrong batch, no token at all, ids outside the
                vocabulary, more tokens than the capacity, or passes or chunk out of range.
            UnsupportedError: A number of passes or ``"adaptive"`` for a model or target without a graph of one pass, or
                ``"adaptive"`` for a target without a bound.
            ContractError: The engine failed or gave values that are not finite. Poisons the session.
        """
        return self._guard.run(Call.prefill, rows, passes, chunk)

    def step(self, tokens: Sequence[int | None] | np.ndarray) -> np.ndarray:
        """Append one token to every row.

        Args:
            tokens: One token id per row; None leaves a row as it is.

        Returns:
            Logits after each row's last token, float32 [batch, vocab], a copy.

        Raises:
            InputError: Closed, poisoned or busy session, wrong batch, ids outside the vocabulary, or a full row.
            ContractError: The engine failed or gave values that are not finite. Poisons the session.
        """
        return self._guard.run(Call.step, tokens)

    def advance(self, tokens: Sequence[int | None] | np.ndarray) -> None:
        """As step(), but the logits stay where the engine computes until they are asked for.

        With ``next_tokens`` a greedy loop on a GPU copies one id per row instead of the logits. There the
        logits are checked when they are read; state and next token are checked at once.

        Args:
            tokens: One token id per row; None leaves a row as it is.

        Raises:
            InputError, ContractError: As step().
        """
        return self._guard.run(Call.advance, tokens)

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray] | None = None,
        options: GenerationOptions | None = None,
        *,
        on_token: TokenCallback | None = None,
    ) -> Generation:
        """Continue every row from its prompt, token by token.

        What a row feeds first is its pending token (drawn by an earlier generation and not fed yet), then its
        prompt. A generation that goes on without prompts gives what the earlier one would have given.

        Args:
            prompts: Prompt of every row; an empty one, or None for all, goes on from what the row holds.
            options: How many tokens, how they are chosen and where to stop; greedy by default.
            on_token: Called for every new token, see :class:`Generation`.

        Returns:
            An iterator that runs the model as it is read; it also holds the tokens and why each row stopped.

        Raises:
            InputError: As for prefill(); a row without prompt holds nothing; prompt and new tokens together
                exceed the capacity of a session that does not evict; stop strings without a tokenizer; or options
                or a callback that are none.
            UnsupportedError: ``passes`` for a model or target without a graph of one pass.
        """
        chosen = checked_options(options)
        tokens = self._guard.run(self._checked_prompts, prompts, chosen)
        return Generation(self, self._guard.run, tokens, chosen, on_token)

    def snapshot(self) -> Snapshot:
        """Copy everything the session holds, for restore() here, in another session or another process.

        Raises:
            InputError: Closed, poisoned or busy session.
        """
        tensors = self._guard.run(Call.contents)
        return Snapshot(bundle=self._info.bundle, target=self.target, tensors=tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Take everything from a snapshot and lift a poisoning; the session's own content is lost.

        Args:
            snapshot: Of the same bundle, target and batch; the capacity may differ, if its tokens fit.

        Raises:
            InputError: Closed or busy session.
            BundleError: The snapshot is of another bundle, target or batch, holds more tokens than the
                capacity, or is damaged. Nothing has changed.
        """
        return self._guard.recover(self._restore, snapshot)

    def fork(self) -> Session:
        """A second session of the bundle with the same content; the two go on independently."""
        snapshot = self.snapshot()
        other = self._info.reopen()
        other.restore(snapshot)
        return other

    def reset(self) -> None:
        """Forget every token and draw, zero caches and state, and lift a poisoning."""
        return self._guard.recover(Call.reset)

    def close(self) -> None:
        """Release the tensors, after a call in another thread has ended; closing twice is harmless.

        Raises:
            InputError: This is a signal handler, say, which has interrupted a call of the session in this very thread.
        """
        self._guard.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked_prompts(
        self, call: Call, prompts: Sequence[Sequence[int] | np.ndarray] | None, options: GenerationOptions
    ) -> list[np.ndarray]:
        """The prompts of a generation, int64 [length] per row; refuses what a row cannot take."""
        given = [()] * self.batch if prompts is None else prompts
        tokens = continuing_rows(given, call.decoder.position, vocab=self.vocab_size)
        call.decoder.prefill_rule(options.passes)
        waiting = (self.history.pending != NO_TOKEN).tolist()
        wanted = [wait + fed.size + options.max_new_tokens for wait, fed in zip(waiting, tokens, strict=True)]
        call.decoder.check_room(wanted, "prompt and new tokens exceed the capacity")
        return tokens

    def _restore(self, call: Call, snapshot: Snapshot) -> None:
        check_snapshot(snapshot, bundle=self._info.bundle, target=self.target, sizes=call.decoder.sizes)
        call.restore(snapshot.tensors)
