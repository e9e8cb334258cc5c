"""Answers as text: when do two say the same?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import exp, log
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
    return _common(told, truth) / max(len(truth), 1)


def rouge_l_f(told: Sequence[Any], truth: Sequence[Any]) -> float:
    """ROUGE-L F in [0, 1]: the harmonic mean of precision and recall, twice the longest common subsequence over the sum
    of both lengths; two empty ones are alike."""
    both = len(told) + len(truth)
    return 2 * _common(told, truth) / both if both else 1.0


def bleu(told: Sequence[Any], truth: Sequence[Any]) -> float:
    """BLEU in [0, 1] of one answer against one truth: the geometric mean of the precisions of 1- to 4-grams, times
    exp(1 - len(truth) / len(told)) where that is below 1 (Papineni et al., ACL 2002).

    The k-th precision that is 0 counts 2^-k over its number of n-grams (at least 1): the third smoothing of Chen and
    Cherry, WMT 2014. Without a common word it is 0. So an answer of fewer than four words is below 1 even where it is
    the truth itself; what is the same to the last word counts 1 here.
    """
    if list(told) == list(truth):
        return 1.0
    if not set(told) & set(truth):
        return 0.0
    zeros, logs = 0, 0.0
    for n in range(1, 5):
        mine, right = _grams(told, n), _grams(truth, n)
        hits, count = sum((mine & right).values()), max(sum(mine.values()), 1)
        zeros += not hits
        logs += log((hits or 2.0**-zeros) / count)
    return exp(logs / 4 + min(0.0, 1 - len(truth) / len(told)))


def _grams(words: Sequence[Any], n: int) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))


def _common(told: Sequence[Any], truth: Sequence[Any]) -> int:
    """The length of the longest common subsequence."""
    best = [0] * (len(truth) + 1)
    for token in told:
        row = [0]
        for k, wanted in enumerate(truth):
            row.append(best[k] + 1 if token == wanted else max(row[k], best[k + 1]))
        best = row
    return best[-1]
