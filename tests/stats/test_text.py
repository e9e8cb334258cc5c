"""When two answers say the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.stats.text import contains, plain_words, same_answer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The U.S. Navy", ["us", "navy"]),
        ("a  Cat,\nan apple; THE end", ["cat", "apple", "end"]),
        ("São Paulo (city)", ["são", "paulo", "city"]),
        ("snake_case", ["snakecase"]),
        ("the", []),
    ],
)
def test_words_without_case_punctuation_and_articles(text: str, words: list[str]) -> None:
    assert plain_words(text) == words


@pytest.mark.parametrize(
    ("told", "accepted", "same"),
    [
        ("in the city of Paris.", ["Rome", "paris"], True),
        ("Harrow", ["Harrow School"], True),
        ("female", ["male"], False),
        ("male", ["female"], False),
        ("", ["male"], False),
        ("the", ["the"], False),
        ("New Jersey, York", ["New York"], False),
        ("Rome", [], False),
    ],
)
def test_either_may_hold_the_other_word_by_word(told: str, accepted: list[str], same: bool) -> None:
    assert same_answer(told, accepted) == same


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=4))
def test_a_run_is_found_as_in_text(one: list[int], other: list[int]) -> None:
    assert contains(one, other) == (bool(other) and "".join(map(str, other)) in "".join(map(str, one)))
