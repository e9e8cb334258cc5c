"""Sets of numbers as bits, in pieces of CHUNK numbers; imports nothing heavy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

CHUNK = 8192
Pieces = Mapping[int, bytes]


def pieces(numbers: Iterable[int]) -> dict[int, bytes]:
    """The bits of a set of numbers >= 0 by piece, ascending; a piece ends with its last number."""
    found: dict[int, bytearray] = {}
    for number in numbers:
        chunk, rest = divmod(number, CHUNK)
        found.setdefault(chunk, bytearray(CHUNK // 8))[rest >> 3] |= 1 << (rest & 7)
    return {chunk: bytes(bits).rstrip(b"\0") for chunk, bits in sorted(found.items())}


def numbers(found: Pieces) -> set[int]:
    """The set that `pieces` took apart."""
    return {
        chunk * CHUNK + 8 * place + bit
        for chunk, bits in found.items()
        for place, byte in enumerate(bits)
        if byte
        for bit in range(8)
        if byte >> bit & 1
    }


def has(bits: bytes, number: int) -> bool:
    """Whether a number is in the piece that it falls into."""
    place, bit = divmod(number % CHUNK, 8)
    return len(bits) > place and bool(bits[place] >> bit & 1)


def digest(found: Pieces) -> str:
    """SHA-256 (hex) of a set: the same for the same numbers."""
    total = hashlib.sha256()
    for chunk, bits in sorted(found.items()):
        total.update(f"{chunk} {len(bits)} ".encode() + bits)
    return total.hexdigest()
