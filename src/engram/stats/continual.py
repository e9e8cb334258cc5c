"""Metrics of continual learning from an accuracy matrix; how streams are split and ordered.

R [T, T]: R[i, j] is the accuracy on test set j after learning experience i, from 0 to 1; entries above the
diagonal may be NaN. Experiences are counted from 1 where a function takes "after i" or "after k"; left out,
it is the last one. What is undefined (forgetting after one experience) is NaN, never 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import nan
from typing import Literal, get_args

import numpy as np
import torch

from engram.errors import EngramError, unknown
from engram.stats.intervals import Values, array

Convention = Literal["natural", "pycil", "mammoth", "avalanche", "coda", "icarl"]

# The fixed order of CIFAR-100 in the experiments of iCaRL (Rebuffi et al. 2017)
ICARL = (
    *(87, 0, 52, 58, 44, 91, 68, 97, 51, 15, 94, 92, 10, 72, 49, 78, 61, 14, 8, 86, 84, 96, 18, 24, 32),
    *(45, 88, 11, 4, 67, 69, 66, 77, 47, 79, 93, 29, 50, 57, 83, 17, 81, 41, 12, 37, 59, 25, 20, 80, 73),
    *(1, 28, 6, 46, 62, 82, 53, 9, 31, 75, 38, 63, 33, 74, 27, 22, 36, 3, 16, 21, 60, 19, 70, 90, 89),
    *(43, 5, 42, 65, 76, 40, 30, 23, 85, 2, 95, 56, 48, 71, 64, 98, 13, 99, 7, 34, 55, 54, 26, 35, 39),
)


def average_accuracy(R: Values, i: int | None = None) -> float:
    """Task mean A_i: the mean of R[i, j] over the experiences j <= i."""
    R, i = _after(R, i)
    return float(R[i - 1, :i].mean())


def sample_accuracy(R: Values, sizes: Values, i: int | None = None) -> float:
    """Sample mean a_i: the same weighted by the sizes [T] of the test sets, as one pass over them gives."""
    R, i = _after(R, i)
    return float(np.average(R[i - 1, :i], weights=array(sizes)[:i]))


def average_incremental(R: Values, sizes: Values | None = None) -> float:
    """Mean over i = 1..T of A_i, or with sizes of a_i; the first experience is included."""
    R, T = _after(R, None)
    weights = np.ones(T) if sizes is None else array(sizes)
    return float(np.mean([sample_accuracy(R, weights, i) for i in range(1, T + 1)]))


def forgetting_by_task(R: Values, k: int | None = None, *, clipped: bool = False) -> np.ndarray:
    """F_j after k, [k - 1]: best accuracy on j before k less that after k; negative only if not clipped."""
    R, k = _after(R, k)
    return np.array([R[j : k - (not clipped), j].max() - R[k - 1, j] for j in range(k - 1)])


def forgetting(R: Values, k: int | None = None) -> float:
    """Mean of F_j over the experiences before k, lower is better (Chaudhry et al. 2018)."""
    return _mean(forgetting_by_task(R, k))


def clipped_forgetting(R: Values, k: int | None = None) -> float:
    """Forgetting whose best includes the row after k, so never negative (PyCIL, Mammoth)."""
    return _mean(forgetting_by_task(R, k, clipped=True))


def backward_transfer(R: Values) -> float:
    """Mean over j < T of R[T, j] - R[j, j], higher is better (Lopez-Paz & Ranzato 2017)."""
    R, T = _after(R, None)
    return _mean((R[-1] - R.diagonal())[: T - 1])


def forward_transfer(R: Values, untrained: Values) -> float:
    """Mean over i > 1 of R[i-1, i] - untrained[i], untrained [T] of the fresh model; higher is better."""
    R, _ = _after(R, None)
    return _mean(R.diagonal(1) - array(untrained)[1:])


def learning_accuracy(R: Values) -> float:
    """Mean of the diagonal: how well each experience was learnt when it was new."""
    R, _ = _after(R, None)
    return float(R.diagonal().mean())


def intransigence(R: Values, joint: Values) -> np.ndarray:
    """joint[k] - R[k, k], [T], joint [T] of models trained on everything so far; lower is better."""
    R, _ = _after(R, None)
    return array(joint) - R.diagonal()


def smith_forgetting(R: Values, classes: Values | None = None) -> float:
    """Drops from the diagonal, weighted by the share of the classes [T] seen (Smith et al. 2023)."""
    R, T = _after(R, None)
    counts = np.ones(T) if classes is None else array(classes)
    drops = [(counts[:i] @ (R.diagonal()[:i] - R[i, :i])) / counts[: i + 1].sum() for i in range(1, T)]
    return _mean(np.array(drops))


def coda_forgetting(R: Values) -> float:
    """Mean over steps of the mean drop from one row to the next (the helper of CODA-Prompt)."""
    R, T = _after(R, None)
    return _mean(np.array([(R[t - 1, :t] - R[t, :t]).mean() for t in range(1, T)]))


def anytime(curve: Values) -> float:
    """Average anytime accuracy: mean of A over all evaluation points [E], not only after experiences."""
    return _mean(array(curve))


def worst_case(points: Values, learnt: Sequence[int]) -> float:
    """Mean over tasks of the least accuracy from the point on at which the task was learnt.

    points [E, T]: accuracies at each evaluation; learnt [T]: index of the first that counts. Shows the
    stability gap.
    """
    table = array(points)
    return _mean(np.array([table[first:, j].min() for j, first in enumerate(learnt)]))


def split_sizes(total: int, base: int, increment: int, tasks: int | None = None) -> list[int]:
    """Classes in each experience: base, then increments, the remainder last; base 0 means equal splits.

    `tasks`: the number of experiences this should give; raises EngramError if it does not, since names such
    as "B50, 5 steps" are read in two ways.
    """
    if not 0 <= base <= total or increment < 1:
        raise EngramError(f"cannot split {total} classes into {base}, then {increment} at a time")
    sizes = [base or min(increment, total)]
    while sum(sizes) < total:
        sizes.append(min(increment, total - sum(sizes)))
    if tasks not in (None, len(sizes)):
        raise EngramError(f"{total} classes as {base}, then {increment} each, are {len(sizes)} tasks, not {tasks}")
    return sizes


def class_order(classes: int, convention: Convention = "natural", seed: int = 0) -> list[int]:
    """Class ids in the order in which a convention lets them appear; `seed` as that library takes it.

    PyCIL (usual seed 1993) lists a NumPy permutation; Mammoth uses the same one as a map from old to new
    label, so its order of appearance is the inverse; Avalanche draws with torch; CODA-Prompt with Python's
    random, and seed 0 is the natural order; "icarl" is the fixed list for CIFAR-100. No global random state
    is touched.
    """
    if convention not in get_args(Convention):
        raise unknown("class order", convention, get_args(Convention))
    if convention == "icarl" and classes != len(ICARL):
        raise EngramError(f"the icarl order is for {len(ICARL)} classes, not {classes}: choose another")
    return {
        "natural": lambda: list(range(classes)),
        "pycil": lambda: np.random.RandomState(seed).permutation(classes).tolist(),
        "mammoth": lambda: np.random.RandomState(seed).permutation(classes).argsort().tolist(),
        "avalanche": lambda: torch.randperm(classes, generator=torch.Generator().manual_seed(seed)).tolist(),
        "coda": lambda: _shuffled(classes, seed),
        "icarl": lambda: list(ICARL),
    }[convention]()


def _shuffled(classes: int, seed: int) -> list[int]:
    order = list(range(classes))
    if seed > 0:
        random.Random(seed).shuffle(order)
    return order


def _after(R: Values, i: int | None) -> tuple[np.ndarray, int]:
    table = array(R)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not len(table):
        raise EngramError(f"an accuracy matrix is square, [T, T]; got {table.shape}")
    i = len(table) if i is None else i
    if not 1 <= i <= len(table):
        raise EngramError(f"there are {len(table)} experiences, counted from 1; got {i}")
    return table, i


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else nan
