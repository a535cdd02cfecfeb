"""What ties a session to its bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crt_export.tokenizer import Tokenizer

if TYPE_CHECKING:
    from crt_export.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class SessionOrigin:
    """Where a session comes from.

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
