"""Sets of numbers as bits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engram.stats.bits import CHUNK, digest, has, numbers, pieces

SETS = st.sets(st.integers(0, 3 * CHUNK), max_size=30)


@given(members=SETS, other=st.integers(0, 3 * CHUNK))
def test_the_set_comes_back_and_each_number_is_found_in_its_piece(members: set[int], other: int) -> None:
    found = pieces(members)
    assert numbers(found) == members
    assert all(has(found[number // CHUNK], number) for number in members)
    assert has(found.get(other // CHUNK, b""), other) == (other in members)
    assert list(found) == sorted(found)


@given(a=SETS, b=SETS)
def test_sets_have_the_same_digest_only_if_they_are_the_same(a: set[int], b: set[int]) -> None:
    assert (digest(pieces(a)) == digest(pieces(b))) == (a == b)


def test_the_bits_are_these() -> None:
    assert pieces({0, 3, 9, CHUNK + 1}) == {0: bytes([0b1001, 0b10]), 1: bytes([0b10])}
    assert pieces(()) == {}
