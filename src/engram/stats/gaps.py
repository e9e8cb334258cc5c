"""How far the figures of an unlearned model lie from those of a retrained one, in one number.

A gap is the difference of two accuracies, of either sign; 0 is the aim.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from engram.errors import EngramError


def mean_gap(gaps: Sequence[float]) -> float:
    """The mean of |gap|, in [0, 1] for accuracies; 0 is no gap at all.

    Gaps of .02, .005 and -.02 give .015. EngramError for no gaps.
    """
    if not gaps:
        raise EngramError("the mean gap of no figures is not defined; give at least one gap")
    return sum(abs(gap) for gap in gaps) / len(gaps)


def tug_of_war(gaps: Sequence[float]) -> float:
    """The product of (1 - |gap|), in [0, 1] for accuracies; 1 is no gap at all.

    Forget .20 against .18, retain .99 against .985 and test .90 against .92 give .955598.
    """
    return prod(1 - abs(gap) for gap in gaps)
