"""The forgetting score of the NeurIPS 2023 competition in machine unlearning (Triantafillou et al. 2024, 2406.09073).

For every forget row, confidences under N unlearned and N retrained models are two samples of one number each. The
better an attack tells them apart, the larger the ε of differential privacy that its error rates bear witness to:

    ε = max(ln(1 - δ - FPR) - ln FNR, ln(1 - δ - FNR) - ln FPR), at least 0

A row earns points that halve with every bin of ε; their mean times what utility is left is the score.
"""

from __future__ import annotations

from math import ceil, log

import numpy as np

from engram.errors import EngramError
from engram.stats.intervals import Values, array

DELTA = 1e-5
CAP = 50.0  # the largest ε of a row
BIN = 0.5  # of ε, over which points halve
BUFFER = 2.0  # how much longer or shorter than the narrower sample an interval may be
PEAKED = 0.01  # ratio of the spreads, below which the samples count as told apart


def forgetting_epsilon(fpr: Values | float, fnr: Values | float, delta: float = DELTA) -> np.ndarray:
    """ε of an attack's error rates, of any shape; +inf where both are 0, NaN (too few models to say) where one is.

    .1 and .2 give 2.079429, .5 and .5 give 0, .01 and .01 give 4.595109.
    """
    p, n = np.broadcast_arrays(array(np.asarray(fpr)), array(np.asarray(fnr)))
    with np.errstate(divide="ignore", invalid="ignore"):
        sides = [np.log(1 - delta - p) - np.log(n), np.log(1 - delta - n) - np.log(p)]
        epsilon = np.fmax(np.fmax(*sides), 0.0)
    return np.where((p == 0) & (n == 0), np.inf, np.where((p == 0) | (n == 0), np.nan, epsilon))


def row_epsilons(unlearned: Values, retrained: Values, delta: float = DELTA) -> np.ndarray:
    """ε [n] of every row by the best attack on its confidences, [N, n] and [M, n]; in [0, 50].

    One threshold (above it: the sample with the larger median) or two (between them: the narrower sample; as far apart
    as this one is wide, give or take 2), at all places where the rates change. 50 where one sample is under 1 % as
    wide as the other; 0 where no attack says anything. The released code tries a grid of 100 places per unit.
    O(n (N + M)²).
    """
    u, r = array(unlearned), array(retrained)
    if u.ndim != 2 or r.ndim != 2 or u.shape[1] != r.shape[1] or min(len(u), len(r)) < 2:
        raise EngramError(
            f"confidences are wanted as [N, n] and [M, n] of two models or more, not {u.shape}, {r.shape}"
        )
    return np.array([_row_epsilon(u[:, k], r[:, k], delta) for k in range(u.shape[1])])


def points(epsilons: Values, models: int) -> np.ndarray:
    """Points [n] of every row: 2 / 2^k in the k-th bin (width .5) of its ε, 0 from ε = ceil(ln(models - 1)) on."""
    if models < 3:
        raise EngramError(f"{models} models a side cannot tell any ε apart; train 3 or more, better 100")
    epsilon = array(epsilons)
    earned = 2.0 ** -np.floor(np.minimum(epsilon, CAP) / BIN)
    return np.where(epsilon < ceil(log(models - 1)), earned, 0.0)


def forgetting_score(epsilons: Values, models: int, retain: tuple[float, float], test: tuple[float, float]) -> float:
    """Mean points times what is left of the accuracy; `retain`, `test`: (unlearned, retrained) accuracies. Higher is
    better; 1 for models that cannot be told from retrained ones.

    ε of .2, .7, 1.3 and 3.1 with 512 models earn .441406; with .95 for .99 and .90 for .92 the score is .414364.
    """
    if not (retain[1] > 0 and test[1] > 0):
        raise EngramError("the retrained models are never right; a share of their accuracy says nothing")
    return float(points(epsilons, models).mean()) * (retain[0] / retain[1]) * (test[0] / test[1])


def _row_epsilon(u: np.ndarray, r: np.ndarray, delta: float) -> float:
    narrow, wide = sorted((u, r), key=np.ptp)
    if np.ptp(wide) > 0 and np.ptp(narrow) / np.ptp(wide) < PEAKED:
        return CAP
    low, high = sorted((u, r), key=np.median)
    rates = [_above(high, low), _between(narrow, wide)]
    fpr, fnr = (np.concatenate([pair[k] for pair in rates]) for k in range(2))
    return float(np.nanmax(forgetting_epsilon(fpr, fnr, delta).clip(max=CAP), initial=0.0))


def _above(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FPR and FNR of "positive from the threshold on", at every value."""
    cuts = np.unique(np.concatenate([positive, negative]))
    below = [np.searchsorted(np.sort(x), cuts) / len(x) for x in (negative, positive)]
    return 1 - below[0], below[1]


def _between(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FPR and FNR of "positive from value i to value j", for all of them of about the width of the positives."""
    values = np.unique(np.concatenate([positive, negative]))
    ends = np.concatenate([[-np.inf], values, [np.inf]])
    i, j = np.triu_indices(len(values))
    width = np.ptp(positive)
    near = (values[j] - values[i] <= width + BUFFER) & (ends[j + 2] - ends[i] > width - BUFFER)
    i, j = i[near], j[near]
    inside = []
    for x in (negative, positive):
        count = np.searchsorted(np.sort(x), values), np.searchsorted(np.sort(x), values, side="right")
        inside.append((count[1][j] - count[0][i]) / len(x))
    return inside[0], 1 - inside[1]
