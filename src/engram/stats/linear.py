"""Linear classifiers on fixed features: rows [n, d] and class ids [n] in, one column a class out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor

from engram.errors import EngramError
from engram.stats.ridge import Ridge
from engram.stats.svm import Blocks, squared_hinge


class Linear(NamedTuple):
    """Scores are x W + b: `classes` [k] ascending, `weight` W [d, k] and `bias` b [k] in float64."""

    classes: Tensor
    weight: Tensor
    bias: Tensor


def linear_svc(x: Tensor, y: Tensor, *, C: float = 1.0, tol: float = 1e-4) -> Linear:
    """One classifier a class against the rest: squared hinge loss times C, L2 penalty, solved in the
    primal."""
    return _fitted(LinearSVC(C=C, tol=tol, dual=False, random_state=0), x, y, 1.0)


def logistic(x: Tensor, y: Tensor, *, C: float = 1.0, tol: float = 1e-6) -> Linear:
    """Softmax regression: cross-entropy summed over rows times C, L2 penalty on W, solved by L-BFGS.

    With two classes it is scikit-learn's binary form, in which the penalty weighs twice as much.
    """
    return _fitted(LogisticRegression(C=C, tol=tol, max_iter=1000), x, y, 0.5)


def ridge_classifier(x: Tensor, y: Tensor, *, C: float = 1.0) -> Linear:
    """Least squares on one-hot targets with an L2 penalty of 1 / C on W and b; O(n d² + d³)."""
    classes, index = torch.unique(y, return_inverse=True)
    ridge = Ridge(x.shape[1] + 1, 1 / C, device=x.device)
    ridge.add(torch.cat([x.double(), x.new_ones(len(x), 1).double()], 1), torch.nn.functional.one_hot(index))
    return Linear(classes, ridge.weights[:-1], ridge.weights[-1])


def svc_of_blocks(classes: Tensor, blocks: Blocks, *, C: float = 1.0, tol: float = 1e-5) -> Linear:
    """What `linear_svc` finds, for rows that come class by class and never stand together in memory."""
    if len(classes) < 2:
        width = next((rows.shape[1] for _, rows in blocks()), 0)
        return Linear(classes, torch.zeros(width, len(classes)).double(), torch.zeros(len(classes)).double())
    return Linear(classes, *squared_hinge(blocks, len(classes), C=C, tol=tol))


def ridge_of_blocks(classes: Tensor, blocks: Blocks, *, C: float = 1.0) -> Linear:
    """What `ridge_classifier` finds, for rows that come class by class."""
    ridge: Ridge | None = None
    for column, rows in blocks():
        ridge = ridge or Ridge(rows.shape[1] + 1, 1 / C, device=rows.device)
        target = torch.nn.functional.one_hot(torch.full((len(rows),), column), len(classes))
        ridge.add(torch.cat([rows.double(), rows.new_ones(len(rows), 1).double()], 1), target.to(rows.device))
    if ridge is None:
        raise EngramError("a classifier cannot be fitted on no rows")
    return Linear(classes, ridge.weights[:-1], ridge.weights[-1])


BLOCKWISE: dict[str, Callable[..., Linear]] = {"svc": svc_of_blocks, "ridge": ridge_of_blocks}
CLASSIFIERS: dict[str, Callable[..., Linear]] = {
    "svc": linear_svc, "logistic": logistic, "ridge": ridge_classifier,
}  # fmt: skip


def _fitted(estimator: LinearSVC | LogisticRegression, x: Tensor, y: Tensor, share: float) -> Linear:
    """A column for every class, also for two of them, for which scikit-learn gives one: then each has its
    `share`."""
    classes = torch.unique(y)
    if len(classes) < 2:
        return Linear(classes, x.new_zeros(x.shape[1], len(classes)).double(), x.new_zeros(len(classes)).double())
    estimator.fit(x.double().cpu().numpy(), y.cpu().numpy())
    weight, bias = estimator.coef_, estimator.intercept_
    if len(classes) == 2:
        weight, bias = (share * np.concatenate([-part, part]) for part in (weight, bias))
    return Linear(
        classes,
        torch.from_numpy(np.ascontiguousarray(weight.T)),
        torch.from_numpy(np.ascontiguousarray(bias)),
    )
