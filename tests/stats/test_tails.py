from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import weibull_min

from engram.errors import EngramError
from engram.stats.intervals import fpr_at
from engram.stats.scores import rejection_threshold
from engram.stats.tails import Tail, fit_tail, fit_weibull
from engram.testing import holds


def draws(shape: float, scale: float, n: int, seed: int = 0) -> np.ndarray:
    return scale * np.random.default_rng(seed).weibull(shape, n)


@holds("open-world-cl", 1)
@pytest.mark.parametrize("seed", range(3))
def test_a_known_law_is_found_again(seed: int) -> None:
    found = fit_tail(draws(2, 0.5, 5000, seed), 5000, start=None)
    assert found.start == 0
    assert found.shape == pytest.approx(2, rel=0.1) and found.scale == pytest.approx(0.5, rel=0.1)


@holds("open-world-cl", 1)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.integers(1, 30))
def test_unusualness_rises_with_the_distance_from_0_to_1(distances: list[float], size: int) -> None:
    omega = fit_tail(distances, size).outlier(torch.linspace(-1, 300, 500))
    assert bool((omega.diff() >= 0).all()) and float(omega.min()) >= 0 and float(omega.max()) <= 1
    assert omega[0] == 0 or min(distances) < 1  # nothing is unusual more than 1 below the tail


@pytest.mark.parametrize(("shape", "scale"), [(0.7, 3.0), (2.0, 0.5), (25.0, 1.05)])
def test_the_fit_is_that_of_scipy(shape: float, scale: float) -> None:
    values = draws(shape, scale, 200)
    theirs = weibull_min.fit(values, floc=0)
    assert fit_weibull(values) == pytest.approx((theirs[0], theirs[2]), rel=1e-3)


def test_only_the_largest_distances_count_and_their_least_lies_at_one() -> None:
    distances = [0.1, 0.7, 0.2, 0.9, 0.8, 0.3]
    tail = fit_tail(distances, 3)
    assert tail.start == pytest.approx(0.7 - 1)
    assert tail == fit_tail([0.0, 0.7, 0.8, 0.9, 0.0], 3)
    theirs = weibull_min.fit([1.0, 1.1, 1.2], floc=0)
    assert (tail.shape, tail.scale) == pytest.approx((theirs[0], theirs[2]), rel=1e-3)
    by_hand = 1 - np.exp(-(((0.75 + 0.3) / tail.scale) ** tail.shape))
    assert float(tail.outlier(torch.tensor([0.75]))) == pytest.approx(by_hand, rel=1e-6)


def test_equal_distances_make_a_step() -> None:
    omega = fit_tail([0.4, 0.4], 2).outlier(torch.tensor([0.39, 0.41]))
    assert omega.tolist() == pytest.approx([0, 1], abs=1e-9)


@given(st.floats(0.01, 0.99), st.floats(0.5, 40), st.floats(0.1, 5), st.floats(-3, 3))
def test_the_inverse_gives_the_share_back(share: float, shape: float, scale: float, start: float) -> None:
    tail = Tail(start, scale, shape)
    assert float(tail.outlier(tail.inverse(torch.tensor([share])))) == pytest.approx(share, rel=1e-5)


def test_bad_distances_are_refused() -> None:
    for wrong in ([], [0.1, float("nan")]):
        with pytest.raises(EngramError, match="finite distances"):
            fit_tail(wrong, 3)
    with pytest.raises(EngramError, match="above 0"):
        fit_tail([0.0, 1.0], 2, start=None)
    with pytest.raises(EngramError, match="there are none"):
        rejection_threshold([])


def test_the_threshold_is_the_least_of_the_grid_that_spares_the_known() -> None:
    scores = np.arange(100) / 100  # 0.00 … 0.99
    assert rejection_threshold(scores, 0.05) == pytest.approx(0.94)
    assert (scores > rejection_threshold(scores, 0.2)).mean() <= 0.2
    assert rejection_threshold([0.0, 0.0]) == pytest.approx(0.01)
    assert rejection_threshold([1.0, 1.0]) == 1.0
    steep = [0.0] * 90 + [0.991 + k / 10_000 for k in range(10)]  # a tenth lies above 0.99
    assert rejection_threshold(steep) == pytest.approx(0.9914)
    assert rejection_threshold(4 * scores, 0.05, largest=4.0) == pytest.approx(4 * 0.94)


def test_false_alarms_by_counting() -> None:
    unknown, known = np.arange(20) + 10.0, np.arange(40) / 2
    least = np.sort(unknown)[1]  # 19 of 20 reach it
    assert fpr_at(unknown, known).value == pytest.approx((known >= least).mean())
    found = fpr_at(unknown, known)
    assert found.low <= found.value <= found.high
    assert fpr_at(known, known, 1.0).value == 1
