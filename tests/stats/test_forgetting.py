"""The forgetting score: the worked numbers, a slow search for the best attack, and the ends of the scale."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.errors import EngramError
from engram.stats.forgetting import CAP, forgetting_epsilon, forgetting_score, points, row_epsilons
from engram.stats.gaps import mean_gap, tug_of_war

EPSILONS = [0.2, 0.7, 1.3, 3.1]


@pytest.mark.parametrize(
    ("fpr", "fnr", "epsilon", "earned"), [(0.1, 0.2, 2.079429, 0.0625), (0.5, 0.5, 0, 1), (0.01, 0.01, 4.595109, None)]
)
def test_worked_epsilons(fpr: float, fnr: float, epsilon: float, earned: float | None) -> None:
    found = forgetting_epsilon(fpr, fnr)
    assert found == pytest.approx(epsilon, abs=2e-6) and forgetting_epsilon(fnr, fpr) == found
    if earned is not None:
        assert points([float(found)], 512).tolist() == [earned]


def test_rates_of_nought() -> None:
    found = forgetting_epsilon([0.0, 0.0, 0.3, 1.0], [0.0, 0.3, 0.0, 1.0])
    np.testing.assert_equal(found, [inf, nan, nan, 0.0])


def test_the_worked_score() -> None:
    assert points(EPSILONS, 512).tolist() == [1, 0.5, 0.25, 0.015625]
    assert points(EPSILONS, 512).mean() == pytest.approx(0.441406, abs=5e-7)
    assert forgetting_score(EPSILONS, 512, (0.95, 0.99), (0.90, 0.92)) == pytest.approx(0.414364, abs=5e-7)
    assert forgetting_score([0.0], 10, (0.9, 0.9), (0.8, 0.8)) == 1


def test_what_few_models_cannot_witness_earns_nothing() -> None:
    assert points([6.99, 7.0, CAP, inf], 512).tolist() == [2.0**-13, 0, 0, 0]  # ln 511 = 6.24
    assert points([0.9, 2.1], 4).tolist() == [0.5, 0]
    with pytest.raises(EngramError, match="2 models a side"):
        points([0.1], 2)
    with pytest.raises(EngramError, match="never right"):
        forgetting_score([0.1], 9, (0.5, 0.0), (0.5, 0.5))


def slow(u: np.ndarray, r: np.ndarray) -> float:
    """Every threshold, and every pair of them, one after the other."""
    values = sorted({*u, *r})
    low, high = sorted((u, r), key=np.median)
    narrow, wide = sorted((u, r), key=np.ptp)
    rates = [((low >= t).mean(), (high < t).mean()) for t in values]
    for i, left in enumerate(values):
        for j in range(i, len(values)):
            most = (values[j + 1] if j + 1 < len(values) else inf) - (values[i - 1] if i else -inf)
            if values[j] - left > np.ptp(narrow) + 2 or most <= np.ptp(narrow) - 2:
                continue
            inside = [(x >= left) & (x <= values[j]) for x in (wide, narrow)]
            rates.append((inside[0].mean(), 1 - inside[1].mean()))
    found = [float(forgetting_epsilon(*pair)) for pair in rates]
    return max([min(x, CAP) for x in found if x == x], default=0.0)


@given(st.integers(0, 10_000), st.floats(0, 3), st.floats(0.3, 5))
@settings(max_examples=25, deadline=None)
def test_the_best_attack_is_found(seed: int, shift: float, scale: float) -> None:
    draws = np.random.default_rng(seed)
    u, r = shift + scale * draws.normal(size=(12, 2)), draws.normal(size=(9, 2))
    found = row_epsilons(u, r)
    assert found == pytest.approx([slow(u[:, k], r[:, k]) for k in range(2)])
    assert row_epsilons(r, u) == pytest.approx(found)


def test_told_apart_by_place_by_width_and_not_at_all() -> None:
    draws = np.random.default_rng(0)
    one, other, wide = draws.normal(size=(200, 30)), draws.normal(size=(200, 30)), 8 * draws.normal(size=(200, 30))
    null = row_epsilons(one, other)
    assert (row_epsilons(one, other + 20) == CAP).all()  # no error at all
    assert (row_epsilons(one / 1e4, other) == CAP).all()  # a peak
    assert row_epsilons(one, wide).min() > null.max()  # the medians are the same: two thresholds tell
    assert row_epsilons(one, other + 2).min() > null.mean()
    assert points(null, 200).mean() > 2 * points(row_epsilons(one, other + 2), 200).mean()


def test_constants_and_wrong_shapes() -> None:
    assert row_epsilons(np.ones((3, 1)), np.ones((3, 1))).tolist() == [0]
    assert row_epsilons(np.ones((3, 1)), np.zeros((3, 1))).tolist() == [CAP]
    with pytest.raises(EngramError, match="confidences are wanted"):
        row_epsilons(np.ones((3, 2)), np.ones((3, 1)))
    with pytest.raises(EngramError, match="two models or more"):
        row_epsilons(np.ones((1, 2)), np.ones((3, 2)))


def test_worked_gaps() -> None:
    gaps = [0.20 - 0.18, 0.99 - 0.985, 0.90 - 0.92]
    assert tug_of_war(gaps) == pytest.approx(0.955598, abs=5e-7)
    assert mean_gap(gaps) == pytest.approx(0.015)
    assert tug_of_war([0.0, 0.0]) == 1 and tug_of_war([1.0, 0.3]) == 0 and mean_gap([0.0]) == 0
    with pytest.raises(EngramError, match="at least one gap"):
        mean_gap([])
