"""Class means and covariances against NumPy, in any order, and after rows have gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.errors import EngramError
from engram.stats.continual import forgetting, sample_accuracy
from engram.stats.moments import ClassMeans, ema
from engram.stats.seeds import generator

X = torch.randn(20, 3, generator=generator("moments"), dtype=torch.float64)
Y = torch.tensor([0, 0, 4, 4, 4, 1, 1, 0, 4, 1] * 2)


def learnt(x: Tensor = X, y: Tensor = Y, scatter: Any = True) -> ClassMeans:
    means = ClassMeans(3, scatter=scatter)
    means.add(x, y)
    return means


def test_means_and_covariances_are_those_of_numpy() -> None:
    means, shared = learnt(), learnt(scatter="shared")
    assert means.classes.tolist() == [0, 1, 4] and means.counts.tolist() == [6, 6, 0, 0, 8]
    parts = {c: X[c == Y].double().numpy() for c in (0, 1, 4)}
    own = {c: np.cov(part.T, bias=True) for c, part in parts.items()}
    pooled = sum(len(parts[c]) * own[c] for c in own) / len(X)
    assert means.mean.numpy() == pytest.approx(np.stack([part.mean(0) for part in parts.values()]))
    assert means.covariance(shared=False).numpy() == pytest.approx(np.stack(list(own.values())))
    assert means.covariance().numpy() == pytest.approx(pooled)
    assert shared.covariance().numpy() == pytest.approx(pooled)


@pytest.mark.parametrize("scatter", [False, True, "shared"])
@given(order=st.permutations(range(20)), cut=st.integers(0, 20), gone=st.sets(st.integers(0, 19), max_size=19))
@settings(max_examples=25, deadline=None)
def test_only_the_rows_that_remain_count(scatter: Any, order: list[int], cut: int, gone: set[int]) -> None:
    means = ClassMeans(3, scatter=scatter)
    for part in (order[:cut], order[cut:]):
        means.add(X[part], Y[part])
    means.remove(X[sorted(gone)], Y[sorted(gone)])
    left = [row for row in range(20) if row not in gone]
    refit = learnt(X[left], Y[left], scatter)
    assert means.classes.tolist() == refit.classes.tolist()
    assert torch.allclose(means.mean, refit.mean, atol=1e-12, rtol=0)
    if scatter:
        assert torch.allclose(means.covariance(), refit.covariance(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scatter", [False, True, "shared"])
def test_a_class_and_a_state_without_rows_are_exactly_zero(scatter: Any) -> None:
    means = learnt(scatter=scatter)
    for x, y in zip(X[Y == 4].split(3), Y[Y == 4].split(3), strict=True):
        means.remove(x, y)  # in other blocks than they came, so that rounding is left
    assert means.classes.tolist() == [0, 1] and (means.sums[4] == 0).all()
    if scatter is True:
        assert (means.second[4] == 0).all() and (means.second[0] != 0).any()
    means.remove(X[Y != 4], Y[Y != 4])
    assert means.mean.shape == (0, 3) and all((part == 0).all() for part in means.state_dict().values())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:1], [2], "more rows of a class"),
        (X[:1], [9], "more rows of a class"),
        (X[:7], [1] * 7, "more rows of a class"),
        (X[:1], [-1], "negative"),
        (X[:2], [0], "not \\[n, 3\\]"),
        (X[:1, :2], [0], "not \\[n, 3\\]"),
        (torch.tensor([[1.0, float("nan"), 0.0]]), [0], "NaN or infinite"),
    ],
)
def test_what_cannot_be_removed_leaves_the_state_untouched(x: Tensor, y: list[int], message: str) -> None:
    means = learnt()
    with pytest.raises(EngramError, match=message):
        means.remove(x, torch.tensor(y))
    assert all(torch.equal(means.state_dict()[key], part) for key, part in learnt().state_dict().items())


@pytest.mark.parametrize(("scatter", "shared"), [(False, True), (False, False), ("shared", False)])
def test_a_covariance_that_was_not_kept_is_an_error(scatter: Any, shared: bool) -> None:
    with pytest.raises(EngramError, match="no such covariance"):
        learnt(scatter=scatter).covariance(shared)


@pytest.mark.parametrize("scatter", [False, True, "shared"])
def test_state_dict_and_back(scatter: Any) -> None:
    means, again = learnt(scatter=scatter), ClassMeans(3, scatter=scatter)
    state = means.state_dict()
    again.load_state_dict(state)
    again.remove(X[:5], Y[:5])
    assert torch.equal(state["counts"], means.counts)  # neither shares memory with the other
    means.remove(X[:5], Y[:5])
    assert all(torch.equal(again.state_dict()[key], part) for key, part in means.state_dict().items())


def test_ema() -> None:
    first = ema(None, torch.tensor([2.0]), 0.9)
    assert first.item() == 2 and ema(first, torch.tensor([4.0]), 0.75).item() == 2.5


def test_nearest_mean_on_the_digits_ends_at_the_known_accuracy() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(torch.tensor(x), torch.tensor(y), test_size=0.3, stratify=y, random_state=0)
    train, test, labels, truth = parts
    train, test = (torch.nn.functional.normalize(part, dim=1) for part in (train, test))
    means, R = ClassMeans(64), np.full((5, 5), np.nan)
    for i in range(5):
        new = labels // 2 == i
        means.add(train[new], labels[new])
        right = means.classes[torch.cdist(test, means.mean).argmin(1)] == truth
        R[i, : i + 1] = [right[truth // 2 == j].double().mean() for j in range(i + 1)]
    sizes = torch.bincount(truth // 2)
    assert sample_accuracy(R, sizes) == pytest.approx(0.9019, abs=5e-5)
    assert forgetting(R) == pytest.approx(0.0506, abs=5e-5)
