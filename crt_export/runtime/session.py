"""A running model: prefill and step over a batch of rows, each with its own length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np

from crt_export.engine.base import Engine
from crt_export.errors import ContractError, InputError, problem_list
from crt_export.runtime.generate import Generation, GenerationOptions
from crt_export.runtime.rows import Group, capacity_problems, groups_from_lengths, token_rows
from crt_export.runtime.tensors import SessionTensors, TensorSizes


class Session:
    """One batch of sequences on one target.

    Rows never influence each other: each has its own position, and the chunks its tokens go through depend on
    its own tokens only. A call that is refused (InputError) changes nothing. A call that fails, or gives a
    value that is not finite, poisons the session: every further call is refused until reset(). Use a session
    from one thread at a time; sessions of one bundle may run in different threads.

    Attributes:
        target: Name of the target.
        batch: Number of rows.
        capacity: Most tokens a row can hold.
        vocab_size: Number of logits per row.
        eos_token_id: The token that ends a sequence; None if the model has none.
    """

    def __init__(self, engine: Engine, sizes: TensorSizes, *, target: str, eos_token_id: int | None) -> None:
        """Allocate the tensors; applications call ``bundle.session()``."""
        self.target = target
        self.batch = sizes.batch
        self.capacity = sizes.capacity
        self.vocab_size = sizes.vocab
        self.eos_token_id = eos_token_id
        self._max_tokens = engine.max_tokens
        self._tensors: SessionTensors | None = SessionTensors(engine, sizes)
        self._position = np.zeros(sizes.batch, np.int64)
        # A row without any token yet has no logits; NaN makes a use of them an error instead of a wrong
        # token.
        self._logits = np.full((sizes.batch, sizes.vocab), np.nan, np.float32)
        self._failure = ""

    @property
    def position(self) -> np.ndarray:
        """Tokens in the cache of each row, int64 [batch], a copy."""
        return self._position.copy()

    def prefill(self, rows: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Append tokens to every row, in parallel passes.

        Args:
            rows: Token ids per row; rows may differ in length, and an empty row stays as it is.

        Returns:
            Logits after each row's last token, float32 [batch, vocab], a copy. An empty row keeps those of
            its last call; NaN if it never had a token.

        Raises:
            InputError: Closed or poisoned session, wrong batch, no token at all, ids outside the vocabulary,
                or more tokens than the capacity. Nothing has changed.
            ContractError: The engine failed or gave values that are not finite. The session needs reset().
        """
        tensors = self._usable_tensors()
        tokens = token_rows(rows, batch=self.batch, vocab=self.vocab_size)
        if not any(row.size for row in tokens):
            raise InputError("empty prompt: prefill needs at least one token in at least one row")
        self._check_capacity([row.size for row in tokens])
        self._guarded(tensors, lambda: self._prefill(tensors, tokens))
        return self._logits.copy()

    def step(self, tokens: Sequence[int | None] | np.ndarray) -> np.ndarray:
        """Append one token to every row.

        Args:
            tokens: One token id per row; None leaves a row as it is.

        Returns:
            Logits after each row's last token, float32 [batch, vocab], a copy.

        Raises:
            InputError: Closed or poisoned session, wrong batch, ids outside the vocabulary, or a full row.
                Nothing has changed.
            ContractError: The engine failed or gave values that are not finite. The session needs reset().
        """
        tensors = self._usable_tensors()
        lengths, ids = self._step_ids(tokens)
        self._check_capacity(lengths)
        groups = groups_from_lengths(self._position, lengths, self.capacity)
        self._guarded(tensors, lambda: self._step(tensors, ids, lengths, groups))
        return self._logits.copy()

    def generate(
        self, rows: Sequence[Sequence[int] | np.ndarray], options: GenerationOptions | None = None
    ) -> Generation:
        """Continue every row from its prompt, token by token.

        Args:
            rows: Prompt of every row, at least one token each; it continues what the session already holds.
            options: How many tokens, how they are chosen and where to stop; greedy by default.

        Returns:
            An iterator that runs the model as it is read; it also holds the tokens and why each row stopped.

        Raises:
            InputError: As for prefill(), or prompt and new tokens together exceed the capacity.
        """
        self._usable_tensors()
        chosen = options if options is not None else GenerationOptions()
        prompts = token_rows(rows, batch=self.batch, vocab=self.vocab_size)
        empty = [f"row {row}: empty prompt" for row, tokens in enumerate(prompts) if not tokens.size]
        if empty:
            raise InputError(problem_list("generate needs at least one token in every row", empty))
        wanted = [tokens.size + chosen.max_new_tokens for tokens in prompts]
        problems = capacity_problems(self._position, wanted, self.capacity)
        if problems:
            raise InputError(problem_list("prompt and new tokens exceed the capacity", problems))
        return Generation(self, prompts, chosen)

    def reset(self) -> None:
        """Forget every token, zero caches and state, and lift a poisoning.

        Raises:
            InputError: The session is closed.
        """
        tensors = self._open_tensors()
        self._position[:] = 0
        self._logits[:] = np.nan
        tensors.clear(self._position)
        self._failure = ""

    def close(self) -> None:
        """Release the tensors; closing twice is harmless."""
        self._tensors = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_tensors(self) -> SessionTensors:
        if self._tensors is None:
            raise InputError("this session is closed; open another with bundle.session()")
        return self._tensors

    def _usable_tensors(self) -> SessionTensors:
        tensors = self._open_tensors()
        if self._failure:
            raise InputError(f"an earlier call of this session failed ({self._failure}); call reset() before going on")
        return tensors

    def _check_capacity(self, lengths: Sequence[int]) -> None:
        problems = capacity_problems(self._position, lengths, self.capacity)
        if problems:
            raise InputError(problem_list("the cache is too small", problems))

    def _step_ids(self, tokens: Sequence[int | None] | np.ndarray) -> tuple[list[int], np.ndarray]:
        if isinstance(tokens, str | bytes) or not hasattr(tokens, "__len__"):
            raise InputError(f"expected one token id per row such as [4], found {type(tokens).__name__}")
        if len(tokens) != self.batch:
            raise InputError(f"expected one token id per row: batch is {self.batch}, found {len(tokens)}")
        ids, lengths, problems = np.zeros((self.batch, 1), np.int64), [0] * self.batch, []
        for row, token in enumerate(tokens):
            if token is None:
                continue
            if not isinstance(token, int | np.integer) or isinstance(token, bool):
                problems.append(f"row {row}: expected an integer, found {token!r}")
            elif not 0 <= token < self.vocab_size:
                limit = self.vocab_size - 1
                problems.append(f"row {row}: token id {token} is outside the vocabulary (0 to {limit})")
            else:
                ids[row, 0], lengths[row] = token, 1
        if problems:
            raise InputError(problem_list("token ids", problems))
        if not any(lengths):
            raise InputError("step needs a token in at least one row")
        return lengths, ids

    def _guarded(self, tensors: SessionTensors, call: Callable[[], None]) -> None:
        """Run a call that changes tensors; if it fails, poison the session and clear what it left."""
        position = self._position.copy()
        try:
            call()
        except BaseException as error:  # an interrupt leaves tensors half-written too
            self._failure = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._position = position
            tensors.clear(position)
            raise

    def _prefill(self, tensors: SessionTensors, tokens: Sequence[np.ndarray]) -> None:
        """Cut every row at multiples of its own ``max_tokens``, so that no row's cuts depend on another."""
        for begin in range(0, max(row.size for row in tokens), self._max_tokens):
            chunk = [row[begin : begin + self._max_tokens] for row in tokens]
            lengths = [row.size for row in chunk]
            groups = groups_from_lengths(self._position, lengths, self.capacity)
            for group, residual in tensors.prefill(chunk, self._position, groups):
                self._refuse_non_finite("residual", residual, group, lengths)
            self._finish(tensors, groups, lengths)

    def _step(self, tensors: SessionTensors, ids: np.ndarray, lengths: Sequence[int], groups: Sequence[Group]) -> None:
        tensors.step(ids, self._position, groups)
        self._finish(tensors, groups, lengths)

    def _finish(self, tensors: SessionTensors, groups: Sequence[Group], lengths: Sequence[int]) -> None:
        """Check what the engine wrote, then count the tokens and keep the logits."""
        state, logits = tensors.state(), tensors.logits()
        for group in groups:
            rows = slice(group.start, group.stop)
            self._refuse_non_finite("state", None if state is None else state[rows], group, lengths)
            self._refuse_non_finite("logits", logits[rows], group, lengths)
        for group in groups:
            rows = slice(group.start, group.stop)
            self._logits[rows] = logits[rows]
        self._position += np.asarray(lengths, np.int64)

    def _refuse_non_finite(self, name: str, values: np.ndarray | None, group: Group, lengths: Sequence[int]) -> None:
        if values is None or np.isfinite(values).all():
            return
        problems = [
            f"row {row} after position {int(self._position[row]) + lengths[row] - 1}"
            for row in range(group.start, group.stop)
            if not np.isfinite(values[row - group.start]).all()
        ]
        raise ContractError(problem_list(f"{self.target}: {name} is not finite", problems))
