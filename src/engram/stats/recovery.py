"""How much of a lost ability has come back."""

from __future__ import annotations

from math import inf, nan

from engram.errors import EngramError
from engram.stats.intervals import Estimate, Values, array, mean


def recovered(now: Values, lost: Values, whole: Values, level: float = 0.95) -> Estimate:
    """mean(now - lost) / mean(whole - lost) over the same n rows: 0 is no better than `lost`, 1 as good as `whole`.

    Of scores [n], right (1) or wrong (0) say; below 0 and above 1 are possible. The rows are paired, so the interval is
    that of a ratio of means: its error per row is (now - lost - ratio (whole - lost)) / mean(whole - lost). NaN, with
    an infinite interval, where `whole` is not better than `lost`. Right 2 of 4 now, 1 of 4 lost and 3 of 4 whole give
    .5. EngramError for scores of different rows.
    """
    a, b, c = (array(values).ravel() for values in (now, lost, whole))
    if not len(a) == len(b) == len(c):
        raise EngramError(f"recovery compares scores of the same rows, and there are {len(a)}, {len(b)} and {len(c)}")
    n, gap = len(a), c - b
    if not n or not gap.mean() > 0:
        return Estimate(nan, -inf, inf, n)
    ratio = float((a - b).mean() / gap.mean())
    half = mean((a - b - ratio * gap) / gap.mean(), level).high
    return Estimate(ratio, ratio - half, ratio + half, n)
