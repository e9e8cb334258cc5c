"""Linear classifiers against scikit-learn's decision functions and their own optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.svm import LinearSVC
from torch import Tensor

from engram.stats.linear import CLASSIFIERS, Linear, linear_svc, logistic, ridge_classifier
from engram.stats.seeds import generator

IDS = [3, 7, 12]


def blobs(classes: list[int]) -> tuple[Tensor, Tensor]:
    y = torch.tensor(classes * 20)
    places = torch.nn.functional.one_hot(y % 7 // 2, 4)  # 1, 0, 2
    return torch.randn(len(y), 4, generator=generator("blobs")) + 3 * places, y


def scores(found: Linear, x: Tensor) -> np.ndarray:
    return (x.double() @ found.weight + found.bias).numpy()


@pytest.mark.parametrize("C", [0.1, 10.0])
@pytest.mark.parametrize("classes", [IDS, IDS[:2]])
def test_scores_are_the_decision_functions_of_scikit_learn(classes: list[int], C: float) -> None:
    x, y = blobs(classes)
    svc = LinearSVC(C=C, tol=1e-8, dual=False, random_state=0).fit(x.double(), y).decision_function(x.double())
    soft = LogisticRegression(C=C, tol=1e-8, max_iter=1000).fit(x.double(), y).decision_function(x.double())
    one, other = scores(linear_svc(x, y, C=C, tol=1e-8), x), scores(logistic(x, y, C=C, tol=1e-8), x)
    assert one.shape == other.shape == (len(x), len(classes))
    if len(classes) == 2:  # scikit-learn has one column: the hinge is symmetric, the logit a difference
        svc, other = np.stack([-svc, svc], 1), other[:, 1] - other[:, 0]
    assert one == pytest.approx(svc, abs=1e-6) and other == pytest.approx(soft, abs=1e-6)


def test_logistic_is_at_the_least_of_its_loss() -> None:
    x, y = blobs(IDS)
    found = logistic(x, y, C=0.5, tol=1e-8)
    W, b = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    target = torch.searchsorted(found.classes, y)
    loss = torch.nn.functional.cross_entropy(x.double() @ W + b, target, reduction="sum")
    (0.5 * loss + W.square().sum() / 2).backward()
    assert W.grad is not None and b.grad is not None
    assert max(W.grad.abs().max(), b.grad.abs().max()) < 1e-3 * len(x)


@pytest.mark.parametrize("C", [0.1, 10.0])
@pytest.mark.parametrize("classes", [IDS, IDS[:2], IDS[:1]])
def test_the_ridge_is_least_squares_on_one_hot_targets(classes: list[int], C: float) -> None:
    x, y = blobs(classes)
    wide, target = torch.cat([x, torch.ones(len(x), 1)], 1).double(), (y[:, None] == torch.tensor(classes)).double()
    known = SklearnRidge(alpha=1 / C, fit_intercept=False, tol=1e-12).fit(wide, target)
    found = ridge_classifier(x, y, C=C)
    assert scores(found, x) == pytest.approx(known.predict(wide).reshape(len(x), -1), abs=1e-9)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_columns_belong_to_the_classes_in_rising_order(name: str) -> None:
    x, y = blobs([12, 3, 7])
    found = CLASSIFIERS[name](x, y)
    assert found.classes.tolist() == IDS and found.weight.dtype == found.bias.dtype == torch.float64
    right = found.classes[torch.from_numpy(scores(found, x)).argmax(1)] == y
    assert right.double().mean() > 0.85
    again = CLASSIFIERS[name](x, y)
    assert torch.equal(found.weight, again.weight) and torch.equal(found.bias, again.bias)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_one_class_has_one_column(name: str) -> None:
    found = CLASSIFIERS[name](*blobs([7]))
    assert found.classes.tolist() == [7] and found.weight.shape == (4, 1) and found.bias.shape == (1,)
