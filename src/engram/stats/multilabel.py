"""How well scores rank rows where a row may have several labels."""

from __future__ import annotations

from math import nan

import numpy as np

from engram.errors import EngramError
from engram.stats.intervals import Values, array


def average_precisions(scores: Values, labels: Values) -> np.ndarray:
    """Average precision of each label, [k]: the mean, over the rows that have it, of the precision at their rank.

    scores [n, k], any numbers that rank rows; labels [n, k]: 1, 0, or NaN where it is not known, which leaves the row
    out for that label. Rows of equal score share the precision behind the last of them, so constant scores give the
    prevalence. NaN for a label that no row has. EngramError for unequal shapes. O(k n log n).
    """
    s, y = array(scores), array(labels)
    if s.shape != y.shape or s.ndim != 2:
        raise EngramError(f"scores are {list(s.shape)} and labels {list(y.shape)}; both have to be [n, k]")
    return np.array([_one(s[:, k], y[:, k]) for k in range(s.shape[1])])


def mean_average_precision(scores: Values, labels: Values) -> float:
    """The mean over the labels that some row has, 0 to 1; NaN if there is none. Random scores give about the mean
    prevalence."""
    found = average_precisions(scores, labels)
    return float(np.nanmean(found)) if np.isfinite(found).any() else nan


def _one(scores: np.ndarray, labels: np.ndarray) -> float:
    known = ~np.isnan(labels)
    s, y = scores[known], labels[known]
    if not y.any():
        return nan
    order = np.argsort(-s, kind="stable")
    last = np.append(np.diff(s[order]) != 0, True)  # the last row of each score
    hits = np.cumsum(y[order])[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((np.diff(hits, prepend=0.0) * precision).sum() / y.sum())
