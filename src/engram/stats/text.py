"""Answers as text: when do two say the same?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_ARTICLES = {"a", "an", "the"}


def plain_words(text: str) -> list[str]:
    """The words of a text: lower case, without punctuation and articles. "The U.S. Navy" gives us, navy."""
    words = re.sub(r"[^\w\s]|_", "", text.casefold()).split()
    return [word for word in words if word not in _ARTICLES]


def contains(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether `other` stands in `one` as an unbroken run; an empty one stands nowhere."""
    n = len(other)
    return n > 0 and any(list(one[k : k + n]) == list(other) for k in range(len(one) - n + 1))


def same_answer(told: str, accepted: Iterable[str]) -> bool:
    """Whether an answer holds an accepted one, or is part of one, word by word after `plain_words`.

    "in the city of Paris" and "paris" are the same; "female" is not "male". What has no word is no answer.
    """
    words = plain_words(told)
    return any(contains(words, right) or contains(right, words) for right in map(plain_words, accepted))


def rouge_l(told: Sequence[Any], truth: Sequence[Any]) -> float:
    """ROUGE-L recall in [0, 1]: the length of the longest common subsequence over that of the truth (at least 1). Cost:
    the product of both lengths."""
    best = [0] * (len(truth) + 1)
    for token in told:
        row = [0]
        for k, wanted in enumerate(truth):
            row.append(best[k] + 1 if token == wanted else max(row[k], best[k + 1]))
        best = row
    return best[-1] / max(len(truth), 1)
