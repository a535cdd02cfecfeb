"""Damage to ONNX files on the level of protobuf's wire: tags, lengths, numbers, nesting, places of external data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_NUMBERS = (0, 1, 2, 7, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
#: Fields of onnx.proto, and some that it does not have.
_FIELDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 20, 22, 23, 25, 99, 2**29 - 1)
_LOCATIONS = (
    "", ".", "..", "../../secret", "/dev/zero", "/etc/passwd", "./fp32.weights", "fp32.weights\0x", "w8.weights", "x",
    "a" * 4096, "a" * 4097, "../graphs/fp32.weights", "fp32.weights/", "step.fp32.onnx", "\x1b[2J", "FP32.WEIGHTS",
)  # fmt: skip
_COUNTS = (
    "", "0", "1", "-1", "+1", " 1", "1 ", "01", "0x10", "1e3", "1.0", "abc", "4096", "143360", "143361", "2147483648",
    "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616", "9" * 400,
)  # fmt: skip


@dataclass
class Field:
    """One field: a number for varints, else the payload."""

    number: int
    wire: int
    value: int | bytes


def edit_onnx(content: bytes, random: Random) -> bytes:
    """Content with one change, somewhere in its messages.

    Raises:
        ValueError: It is no protobuf any more.
    """
    if random.random() < 0.35:
        return _edit_external_data(content, random)
    return _edit_within(content, random, random.choice(_EDITS))


def parse(content: bytes) -> list[Field]:
    """The fields of one message.

    Raises:
        ValueError: The bytes are no message.
    """
    fields: list[Field] = []
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        number, wire = tag >> 3, tag & 7
        if number == 0 or number >= 2**29:
            raise ValueError("no field")
        if wire == _VARINT:
            value, at = _varint(content, at)
            fields.append(Field(number, wire, value))
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if wire == _BYTES:
            length, at = _varint(content, at)
        if length is None or at + length > len(content):
            raise ValueError("no payload")
        fields.append(Field(number, wire, content[at : at + length]))
        at += length
    return fields


def serialise(fields: list[Field]) -> bytes:
    """The message of these fields."""
    return b"".join(_field_bytes(field) for field in fields)


def varint_bytes(value: int) -> bytes:
    """A number as protobuf writes it."""
    value &= 2**64 - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _field_bytes(field: Field) -> bytes:
    tag = varint_bytes(field.number << 3 | field.wire)
    if isinstance(field.value, int):
        return tag + varint_bytes(field.value)
    return tag + (varint_bytes(len(field.value)) if field.wire == _BYTES else b"") + field.value


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise ValueError("the end is inside a number")
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")


def _edit_within(content: bytes, random: Random, edit: Callable[[list[Field], int, Random], bytes]) -> bytes:
    """Go down into a random message, change one of its fields, and put everything around it together again."""
    fields = parse(content)
    if not fields:
        raise ValueError("an empty message")
    index = random.randrange(len(fields))
    field = fields[index]
    if field.wire == _BYTES and isinstance(field.value, bytes) and field.value and random.random() < 0.85:
        try:
            field.value = _edit_within(field.value, random, edit)
            return serialise(fields)
        except ValueError:
            pass  # a text, or packed numbers
    return edit(fields, index, random)


def _edit_external_data(content: bytes, random: Random) -> bytes:
    """Another location, offset or length of one of the tensors."""
    entries: list[tuple[list[Field], list[tuple[Field, list[Field]]]]] = []

    def search(message: bytes, path: list[tuple[Field, list[Field]]]) -> list[Field]:
        fields = parse(message)
        for field in fields:
            if field.wire == _BYTES and isinstance(field.value, bytes) and len(field.value) > 4 and len(path) < 6:
                try:
                    inner = search(field.value, [*path, (field, fields)])
                except ValueError:
                    continue
                if len(inner) == 2 and inner[0].value in (b"location", b"offset", b"length"):
                    entries.append((inner, [*path, (field, fields)]))
        return fields

    root = search(content, [])
    if not entries:
        raise ValueError("no external data")
    inner, path = random.choice(entries)
    values = _LOCATIONS if inner[0].value == b"location" else _COUNTS
    which = random.random()
    if which < 0.85:
        inner[1].value = random.choice(values).encode()
    elif which < 0.95:
        inner[0].value = random.choice((b"location", b"offset", b"length", b"checksum", b"basepath", b""))
    else:
        inner.append(Field(2, _BYTES, random.choice(values).encode()))
    message = inner
    for field, fields in reversed(path):
        field.value = serialise(message)
        message = fields
    return serialise(root)


def _renumber(fields: list[Field], index: int, random: Random) -> bytes:
    fields[index].number = random.choice(_FIELDS)
    return serialise(fields)


def _drop(fields: list[Field], index: int, random: Random) -> bytes:
    del fields[index]
    return serialise(fields)


def _repeat(fields: list[Field], index: int, random: Random) -> bytes:
    fields[index:index] = [fields[index]] * random.choice((1, 1, 2, 500))
    return serialise(fields)


def _swap(fields: list[Field], index: int, random: Random) -> bytes:
    other = random.randrange(len(fields))
    fields[index], fields[other] = fields[other], fields[index]
    return serialise(fields)


def _cross(fields: list[Field], index: int, random: Random) -> bytes:
    other = random.choice(fields)
    fields[index] = Field(fields[index].number, other.wire, other.value)
    return serialise(fields)


def _value(fields: list[Field], index: int, random: Random) -> bytes:
    field = fields[index]
    if isinstance(field.value, int):
        field.value = random.choice((*_NUMBERS, field.value + 1, field.value ^ 1))
    else:
        payload = field.value
        field.value = random.choice((b"", payload[:-1], payload + b"\0", b"\xff" * len(payload), payload * 2, b"x"))
    return serialise(fields)


def _wire(fields: list[Field], index: int, random: Random) -> bytes:
    """A tag whose wire type does not fit what follows, groups among them."""
    tag = varint_bytes(fields[index].number << 3 | random.randrange(8))
    return serialise(fields[:index]) + tag + _field_bytes(fields[index])[1:] + serialise(fields[index + 1 :])


def _length(fields: list[Field], index: int, random: Random) -> bytes:
    """A length that is not that of the payload."""
    tag = varint_bytes(fields[index].number << 3 | _BYTES)
    value = fields[index].value
    payload = value if isinstance(value, bytes) else b""
    length = random.choice((*_NUMBERS, len(payload) + 1, max(0, len(payload) - 1)))
    return serialise(fields[:index]) + tag + varint_bytes(length) + payload + serialise(fields[index + 1 :])


def _long_number(fields: list[Field], index: int, random: Random) -> bytes:
    """A number of more bytes than it needs, or than there can be."""
    tag = varint_bytes(fields[index].number << 3)
    number = b"\x80" * random.choice((1, 8, 9, 10, 11, 5000)) + random.choice((b"\x00", b"\x01", b"\x7f", b""))
    return serialise(fields[:index]) + tag + number + serialise(fields[index + 1 :])


def _nest(fields: list[Field], index: int, random: Random) -> bytes:
    """Graphs in attributes of nodes of graphs, as deep as protobuf allows and deeper; a tensor outside at the end."""
    entry = b"\x0a\x08location\x12\x06../../"
    graph = serialise([Field(5, _BYTES, serialise([Field(13, _BYTES, entry), Field(14, _VARINT, 1)]))])
    for _ in range(random.choice((1, 3, 30, 33, 34, 100, 2000))):
        attribute = Field(5, _BYTES, serialise([Field(random.choice((6, 11)), _BYTES, graph)]))
        graph = serialise([Field(1, _BYTES, serialise([attribute]))])
    fields.insert(index, Field(random.choice((7, 6, 11, 20)), _BYTES, graph))
    return serialise(fields)


_EDITS = (
    _renumber, _drop, _repeat, _swap, _cross, _value, _value, _value, _wire, _length, _long_number, _nest,
)  # fmt: skip
