"""Extreme-value tails: how unusual a distance is, given the largest that were seen.

The largest of many distances follow a Weibull law where they are bounded (Fisher, Tippett 1928). As in meta-recognition
(Scheirer et al. 2011, TPAMI 33(8)) and OpenMax (Bendale, Boult 2016, arXiv 1511.06233) the law is fitted to the tail
alone, after a shift that puts its smallest value at 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engram.errors import EngramError
from engram.stats.intervals import Values, array

STEEPEST = 1e4  # the largest shape: equal values would have an infinite one


@dataclass(frozen=True)
class Tail:
    """A Weibull law of distances d: F(d) = 1 - exp(-((d - start) / scale)^shape), 0 below `start`."""

    start: float
    scale: float
    shape: float

    def outlier(self, distances: Tensor) -> Tensor:
        """F of distances, of any shape, in [0, 1]; float64."""
        return outlier(distances, *(torch.tensor(x, dtype=torch.float64) for x in (self.start, self.scale, self.shape)))

    def inverse(self, shares: Tensor) -> Tensor:
        """The distances at which F has these values in [0, 1); float64."""
        return self.start + self.scale * (-torch.log1p(-shares.double())).pow(1 / self.shape)


def outlier(distances: Tensor, start: Tensor, scale: Tensor, shape: Tensor) -> Tensor:
    """F of distances by laws that are given as tensors, each of a shape that fits the others; float64."""
    reached = ((distances.double() - start) / scale).clamp(min=0)
    return -torch.expm1(-reached.pow(shape))


def fit_tail(distances: Values, size: int, start: float | None = 1.0) -> Tail:
    """The law of the `size` largest distances [n], by maximum likelihood.

    They are moved so that the smallest of them lies at `start`; None leaves them where they are. EngramError for no
    distances, for ones that are not finite, and for ones not above 0 that are not moved. Cost: O(n log n).
    """
    found = np.sort(array(distances).ravel())[::-1][: max(size, 1)]
    if not len(found) or not np.isfinite(found).all():
        raise EngramError(f"a tail is fitted to finite distances, one or more; these are {len(found)}, or not finite")
    moved = 0.0 if start is None else start - float(found[-1])
    shape, scale = fit_weibull(found + moved)
    return Tail(-moved, scale, shape)


def fit_weibull(values: Values) -> tuple[float, float]:
    """Shape and scale of the Weibull law of values [n] above 0, by maximum likelihood; the shape is at most 10,000.

    `scipy.stats.weibull_min.fit(values, floc=0)` with the scale eliminated: the shape k solves
    sum v^k ln v / sum v^k - 1 / k = mean ln v, of which the left side rises with k.
    """
    from scipy.optimize import brentq

    v = array(values).ravel()
    if not len(v) or not (v > 0).all():
        raise EngramError("a Weibull law is fitted to values above 0; move them, or leave out those that are not")
    logs = np.log(v / v.max())

    def gap(k: float) -> float:
        weights = np.exp(k * logs)
        return float((weights * logs).sum() / weights.sum() - 1 / k - logs.mean())

    k = STEEPEST if gap(STEEPEST) <= 0 else float(brentq(gap, 1e-3, STEEPEST, xtol=1e-10))
    return k, float(v.max() * np.exp(k * logs).mean() ** (1 / k))
