"""stdout and stderr while a command runs: every byte gets out or the command fails, and no control character does.

Python's own streams lose what does not fit into a non-blocking pipe, and are silent where a file descriptor is closed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from crt_export.errors import OutputError
from crt_export.visible import visible

#: What a shell reports for a program that SIGPIPE ended.
EXIT_BROKEN_PIPE = 141


class Output(io.TextIOBase):
    """stdout or stderr.

    Attributes:
        lost: Why something could not be written to stderr; None where nothing was lost.
    """

    def __init__(self, stream: IO[str] | None, name: str, *, strict: bool) -> None:
        """Wrap a stream.

        Args:
            stream: Python's own; None where the file descriptor was closed.
            name: For messages.
            strict: Whether a failure raises; else it is remembered in ``lost`` and the command goes on.
        """
        self._stream, self._name, self._strict = stream, name, strict
        self._descriptor = _descriptor(stream)
        self.lost: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream behind it."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """Characters that the encoding lacks are replaced."""
        return "replace"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation(f"{self._name} is closed")
        return self._stream.fileno()

    def write(self, text: str, /) -> int:
        """Write text at once, control characters as escapes.

        Raises:
            OutputError: stdout cannot be written to, for another reason than the next.
            BrokenPipeError: Nobody reads stdout any more.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected str, found {type(text).__name__}")
        self.send(visible(text))
        return len(text)

    def send(self, text: str) -> None:
        """Write text as it is: what this package drew itself, or raw text for a pipe. Raises as write()."""
        try:
            self._send(text.encode(self.encoding, errors="replace"))
        except OSError as error:
            if not self._strict:
                self.lost = self.lost or error
            elif isinstance(error, BrokenPipeError):
                raise
            else:
                raise OutputError(f"{self._name} cannot be written to: {error.strerror or error}") from error

    def _send(self, data: bytes) -> None:
        if self._stream is None:
            raise OSError(errno.EBADF, "it is closed")
        if self._descriptor is None:
            self._stream.write(data.decode(self.encoding))
            self._stream.flush()
            return
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # its reader is slow
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()


class Drawn:
    """An output as rich wants it: what rich draws holds escape sequences of its own."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def write(self, text: str) -> int:
        self._output.send(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


@contextlib.contextmanager
def checked_streams() -> Iterator[tuple[Output, Output]]:
    """Put outputs in the place of ``sys.stdout`` and ``sys.stderr``; gives both."""
    _occupy_closed_descriptors()
    before = sys.stdout, sys.stderr
    for stream in before:
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    output, messages = Output(before[0], "stdout", strict=True), Output(before[1], "stderr", strict=False)
    sys.stdout, sys.stderr = output, messages
    try:
        yield output, messages
    finally:
        sys.stdout, sys.stderr = before


def sent(stream: Any, text: str) -> None:
    """Write text without escapes to an output, or to a stream that took its place."""
    if isinstance(stream, Output):
        stream.send(text)
    else:
        stream.write(text)
        stream.flush()


def _descriptor(stream: IO[str] | None) -> int | None:
    """The file descriptor of a stream of the interpreter itself; None for what an application put in its place."""
    if os.name != "posix" or type(stream) is not io.TextIOWrapper:
        return None
    raw = getattr(stream.buffer, "raw", stream.buffer)  # unbuffered streams (python -u) have one layer less
    return raw.fileno() if isinstance(raw, io.FileIO) else None


def _occupy_closed_descriptors() -> None:
    """Else the next file that is opened gets the number, and what native code prints ends up in it.

    A closed stdout becomes one that is always full: what is written to ``/dev/stdout`` by name must not vanish either.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            full = descriptor == 1 and Path("/dev/full").exists()
            with contextlib.suppress(OSError):
                os.open("/dev/full" if full else os.devnull, os.O_RDWR)
