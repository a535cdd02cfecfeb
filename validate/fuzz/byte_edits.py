"""Damage that knows no format: bits, truncations, slices moved, dropped and repeated."""

from __future__ import annotations

from random import Random

_MOST_INSERTED = 64


def edit_bytes(content: bytes, random: Random) -> bytes:
    """Content with one damage."""
    return random.choice(_EDITS)(content, random) if content else random.randbytes(random.randint(1, _MOST_INSERTED))


def _flip_bit(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    changed[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _set_bytes(content: bytes, random: Random) -> bytes:
    begin, end = _slice(content, random)
    return content[:begin] + random.choice((b"\0", b"\xff", b"\x80", b"9", b'"')) * (end - begin) + content[end:]


def _truncate(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def _drop(content: bytes, random: Random) -> bytes:
    begin, end = _slice(content, random)
    return content[:begin] + content[end:]


def _repeat(content: bytes, random: Random) -> bytes:
    begin, end = _slice(content, random)
    return content[:begin] + content[begin:end] * random.choice((2, 2, 3, 200)) + content[end:]


def _insert(content: bytes, random: Random) -> bytes:
    at = random.randrange(len(content) + 1)
    return content[:at] + random.randbytes(random.randint(1, _MOST_INSERTED)) + content[at:]


def _splice(content: bytes, random: Random) -> bytes:
    """One part of the file where another one was."""
    begin, end = _slice(content, random)
    source = random.randrange(len(content))
    return content[:begin] + content[source : source + end - begin] + content[end:]


def _append(content: bytes, random: Random) -> bytes:
    return content + random.choice((b"\0", b"\n", b"{}", content[:100], random.randbytes(9)))


_EDITS = (_flip_bit, _flip_bit, _set_bytes, _truncate, _drop, _repeat, _insert, _splice, _append)


def _slice(content: bytes, random: Random) -> tuple[int, int]:
    begin = random.randrange(len(content))
    return begin, min(len(content), begin + random.choice((1, 2, 4, 8, 100)))
