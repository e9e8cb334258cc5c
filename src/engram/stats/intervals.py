"""Intervals for what was measured, and the comparison with oracles from which verdicts are read.

All intervals are two-sided at `level`, .95 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, isfinite, isnan, nan

import numpy as np
from torch import Tensor

from engram.errors import EngramError

Values = Tensor | np.ndarray | Sequence[float]


@dataclass(frozen=True)
class Interval:
    """From low to high, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A value measured on n rows, with its interval."""

    value: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> Interval:
        """The interval alone."""
        return Interval(self.low, self.high)


@dataclass(frozen=True)
class Comparison:
    """A value less the mean of the oracles', with an interval for that difference; numbers, not a verdict.

    `spread`: the half-width that comes from the oracles alone; more rows do not make it less, more oracles
    do. `n_needed`: rows with which the interval would fit inside [-margin, margin], if the difference stayed
    as it is; `n_outside`: rows with which it would lie wholly outside. None where no number of rows would do.
    """

    difference: float
    low: float
    high: float
    margin: float
    spread: float
    n_needed: int | None
    n_outside: int | None


def array(x: Values) -> np.ndarray:
    """Any vector or table of numbers as float64 NumPy."""
    return np.asarray(x.detach().double().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)


def proportion(hits: int, n: int, level: float = 0.95) -> Estimate:
    """Share hits / n with the Clopper-Pearson interval, which covers at least `level` for every n."""
    from scipy.special import betaincinv

    if not 0 <= hits <= n:
        raise EngramError(f"{hits} hits of {n} rows is no proportion")
    tail = (1 - level) / 2
    low = float(betaincinv(hits, n - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return Estimate(hits / n if n else nan, low, high, n)


def mean(values: Values, level: float = 0.95) -> Estimate:
    """Mean with the t interval; with fewer than two values the interval is infinite."""
    x = array(values).ravel()
    if len(x) < 2:
        return Estimate(float(x[0]) if len(x) else nan, -inf, inf, len(x))
    half = _t(level, len(x) - 1) * float(x.std(ddof=1)) / len(x) ** 0.5
    return Estimate(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, len(x))


def auc(pos: Values, neg: Values, level: float = 0.95) -> Estimate:
    """Area under the ROC curve, P(pos > neg) + P(equal) / 2; n counts both sides.

    Interval: the variance of Hanley & McNeil (1982) at the limit itself, as in a score interval (Newcombe
    2006, method 5), so it does not collapse when the two are separated. O(n log n).
    """
    from scipy.stats import rankdata

    p, q = array(pos).ravel(), array(neg).ravel()
    if not (len(p) and len(q)):
        raise EngramError("an AUC needs at least one value on each side")
    ranks = float(rankdata(np.concatenate([p, q]))[: len(p)].sum())
    value = (ranks - len(p) * (len(p) + 1) / 2) / (len(p) * len(q))
    low, high = _auc_low(value, len(p), len(q), level), 1 - _auc_low(1 - value, len(p), len(q), level)
    return Estimate(value, low, high, len(p) + len(q))


def tpr_at(pos: Values, neg: Values, fpr: float, level: float = 0.95) -> Estimate:
    """Share of pos above the lowest threshold that lets at most the share fpr of neg pass (passing: score > it).

    The interval covers both samples: the threshold's own, from order statistics of neg, and Clopper-Pearson
    of pos, half the error each. So a small fpr needs about 5 / fpr values in neg before anything can be said.
    """
    from scipy.stats import binom

    p, q = array(pos).ravel(), np.sort(array(neg).ravel())[::-1]
    if not (len(p) and len(q)):
        raise EngramError("a true positive rate at a false positive rate needs values on both sides")
    allowed, half = floor(fpr * len(q) + 1e-9), (1 - level) / 2
    hits = int((p > q[allowed]).sum()) if allowed < len(q) else len(p)
    few, many = (int(binom.ppf(tail, len(q), fpr)) for tail in (half / 2, 1 - half / 2))
    least = int((p > q[few - 1]).sum()) if few > 0 else 0
    most = int((p > q[many]).sum()) if many < len(q) else len(p)
    low, high = proportion(least, len(p), 1 - half).low, proportion(most, len(p), 1 - half).high
    return Estimate(hits / len(p), low, high, len(p))


def fpr_at(pos: Values, neg: Values, tpr: float = 0.95, level: float = 0.95) -> Estimate:
    """Share of neg at or above the highest threshold that at least the share `tpr` of pos reaches, with its interval.

    With scores of unknown rows as pos and of known ones as neg: the false alarms when 95% of the unknown are found
    (Hendrycks, Mazeika, Dietterich 2019, arXiv 1812.04606).
    """
    passed = tpr_at(-array(neg), -array(pos), 1 - tpr, level)
    return Estimate(1 - passed.value, 1 - passed.high, 1 - passed.low, passed.n)


def bootstrap(
    values: Values,
    statistic: Callable[[np.ndarray], float],
    generator: np.random.Generator,
    level: float = 0.95,
    resamples: int = 2000,
) -> Estimate:
    """Percentile bootstrap of a statistic of rows [n] or [n, …]; calls it `resamples` + 1 times."""
    x = array(values)
    draws = [statistic(x[generator.integers(len(x), size=len(x))]) for _ in range(resamples)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(statistic(x)), float(low), float(high), len(x))


def equivalence(
    value: float,
    error: Interval | Estimate | tuple[float, float] | float,
    n: int,
    reference: Sequence[float],
    margin: float,
    *,
    level: float = 0.95,
) -> Comparison:
    """Compare a value measured on n rows with the values of k oracles.

    `error`: the value's interval at `level`, or its standard error. The oracles stand for a law of which one
    fresh draw differs from the mean of k by sd·√(1 + 1/k): their half-width is that times the t quantile with
    k - 1 degrees of freedom, infinite for k = 1. The two half-widths are added in squares, on each side by
    itself (Zou & Donner 2008), so intervals may be lopsided. Rows that value and oracles share can only make
    the difference surer than this says. `n_needed` and `n_outside` take the value's half-width to fall as
    1/√n.
    """
    k, below, above = len(reference), *_halves(value, error, n, level)
    if not k or not margin >= 0:
        raise EngramError(f"equivalence needs oracle values and a margin >= 0, got {k} oracles, margin {margin}")
    oracles = array(reference)
    difference = float(value - oracles.mean())
    spread = _t(level, k - 1) * float(oracles.std(ddof=1)) * (1 + 1 / k) ** 0.5 if k > 1 else inf
    if not isfinite(difference):
        return Comparison(nan, -inf, inf, margin, spread, None, None)
    low, high = difference - float(np.hypot(below, spread)), difference + float(np.hypot(above, spread))
    inside = [_rows(margin + difference, below, spread, n), _rows(margin - difference, above, spread, n)]
    outside = _rows(abs(difference) - margin, below if difference > 0 else above, spread, n)
    needed = None if None in inside else max(i for i in inside if i is not None)
    return Comparison(difference, low, high, margin, spread, needed, outside)


def holm(p_values: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Which hypotheses fall, in the order given; a true one with a chance of at most alpha (Holm 1979).

    One whose p value is NaN is counted, and never falls.
    """
    order = sorted(range(len(p_values)), key=lambda i: (isnan(p_values[i]), p_values[i]))
    fallen = [False] * len(p_values)
    for rank, i in enumerate(order):
        if not p_values[i] <= alpha / (len(p_values) - rank):
            break
        fallen[i] = True
    return fallen


def _t(level: float, freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + level) / 2)) if freedom > 0 else inf


def _auc_low(value: float, p: int, q: int, level: float) -> float:
    """Where (value - θ)² = z² V(θ), below value."""
    from scipy.optimize import brentq
    from scipy.special import ndtri

    z, pairs = float(ndtri((1 + level) / 2)), (p + q) / 2 - 1

    def gap(t: float) -> float:
        return (value - t) ** 2 - z**2 * t * (1 - t) * (1 + pairs * ((1 - t) / (2 - t) + t / (1 + t))) / (p * q)

    return float(brentq(gap, 0.0, min(value, 1 - 1e-9))) if value > 0 else 0.0


def _halves(
    value: float, error: Interval | Estimate | tuple[float, float] | float, n: int, level: float
) -> tuple[float, float]:
    """The value's half-widths below and above."""
    if isinstance(error, Interval | Estimate):
        error = error.low, error.high
    if isinstance(error, tuple):
        below, above = value - error[0], error[1] - value
    else:
        below = above = float(error) * _t(level, n - 1) if error else 0.0
    return _known(below), _known(above)


def _known(half: float) -> float:
    return inf if isnan(half) else max(0.0, half)


def _rows(room: float, half: float, spread: float, n: int) -> int | None:
    """Rows with which √(half² n / rows + spread²) <= room."""
    rest = room**2 - spread**2 if room > 0 else -inf
    if not rest > 0 or not isfinite(half):
        return None
    return max(1, ceil(n * half**2 / rest * (1 - 1e-12)))
