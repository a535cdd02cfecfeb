"""Protobuf fields of a file, read without the protobuf package.

Never holds more than one short string in memory and skips everything else by seeking. Wire format:
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

_MAX_STRING = 4096
VARINT, _FIXED64, BYTES, _FIXED32 = 0, 1, 2, 5


class WireError(Exception):
    """The bytes are not what a protobuf writer produces."""


class WireReader:
    """Reads protobuf fields from a stream; never reads past ``end`` and never trusts a declared length."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.offset = 0

    def fields(self, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (field number, wire type, value or length) up to byte ``end``.

        For a length-delimited field the payload starts at ``self.offset``; what the consumer leaves unread is
        skipped.
        """
        while self.offset < end:
            tag = self.varint(end)
            number, wire_type = tag >> 3, tag & 7
            if tag > 0xFFFFFFFF or number == 0:
                raise WireError(f"impossible field tag {tag}")
            if wire_type == VARINT:
                yield number, wire_type, self.varint(end)
                continue
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire_type)
            if wire_type == BYTES:
                length = self.varint(end)
            if length is None:
                raise WireError(f"unsupported wire type {wire_type} in field {number}")
            if length > end - self.offset:
                raise WireError(f"field {number} claims {length} bytes, {end - self.offset} are left")
            after = self.offset + length
            yield number, wire_type, length
            self.skip_to(after)

    def varint(self, end: int) -> int:
        """Read one variable-length integer of at most 64 bits."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self._stream.read(1) if self.offset < end else b""
            if not byte:
                raise WireError("the file ends inside a number")
            self.offset += 1
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF
        raise WireError("a number is longer than 10 bytes")

    def text(self, length: int) -> str:
        """Read a short UTF-8 string."""
        if length > _MAX_STRING:
            raise WireError(f"a name or path of {length} bytes (at most {_MAX_STRING} are allowed)")
        content = self._stream.read(length)
        self.offset += len(content)
        if len(content) != length:
            raise WireError("the file ends inside a string")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise WireError("a name or path that is not UTF-8") from None

    def skip_to(self, offset: int) -> None:
        """Continue at ``offset``."""
        if offset != self.offset:
            self._stream.seek(offset)
            self.offset = offset
