"""Distances of distributions: the worked numbers, SciPy, and the ends of each scale."""

from __future__ import annotations

from math import inf, isnan, log, sqrt
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy, wasserstein_distance
from torch import Tensor

from engram.errors import EngramError
from engram.stats.divergence import activation_distance, histogram_kl, js, kl, wasserstein, zrf
from engram.stats.seeds import generator

P, UNIFORM = torch.tensor([[0.7, 0.2, 0.1]]).double(), torch.full((1, 3), 1 / 3).double()
A, B = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[0.0], [0], [0], [3]])
SAMPLES = st.lists(st.integers(-20, 20).map(lambda v: v / 4), min_size=1, max_size=12)


def softmax(*key: object) -> Tensor:
    return torch.randn(7, 4, generator=generator("softmax", *key), dtype=torch.float64).softmax(1)


@pytest.mark.parametrize(("right_edge", "value"), [("closed", 4.788662), ("open", 6.576671)])
def test_worked_histograms(right_edge: Literal["closed", "open"], value: float) -> None:
    assert histogram_kl(A, B, bins=4, right_edge=right_edge).item() == pytest.approx(value, abs=5e-7)


def test_worked_probabilities() -> None:
    assert activation_distance(P, UNIFORM) == pytest.approx(0.454606, abs=5e-7)
    assert activation_distance(P, UNIFORM, 1) == pytest.approx(0.733333, abs=5e-7)
    assert js(P, UNIFORM).item() == pytest.approx(0.074806, abs=5e-7)
    assert zrf(P, UNIFORM) == pytest.approx(0.925194, abs=5e-7)
    assert zrf(P, UNIFORM, as_published=True) == pytest.approx(0.973179, abs=5e-7)


def test_histograms_against_numpy_row_by_row() -> None:
    draws = generator("histograms")
    a, b = torch.randn(60, 5, generator=draws).double(), 2 * torch.randn(40, 5, generator=draws).double()
    found = histogram_kl(a, b, bins=10, clip=1.5)
    for row in range(5):
        one, other = (x[:, row].clamp(-1.5, 1.5).numpy() for x in (a, b))
        ends = min(one.min(), other.min()), max(one.max(), other.max())
        p, q = (np.histogram(x, 10, ends)[0] / len(x) for x in (one, other))
        held = p > 0
        assert found[row].item() == pytest.approx((p[held] * np.log(p[held] / q[held].clip(1e-5))).sum())
    assert not torch.allclose(found, histogram_kl(b, a, bins=10, clip=1.5))


def test_histograms_from_equal_to_disjoint() -> None:
    assert histogram_kl(A, A).item() == 0
    assert histogram_kl(A / 10, A / 10 + 50).item() == pytest.approx(log(1e5)) == pytest.approx(11.51, abs=5e-3)
    assert histogram_kl(A + 200, A + 300).item() == 0  # both at the clip
    edges: tuple[Literal["closed", "open"], ...] = ("closed", "open")
    for right_edge in edges:
        assert histogram_kl(torch.ones(3, 2), torch.ones(4, 2), right_edge=right_edge).tolist() == [0, 0]
    one, other = (torch.tensor(x, dtype=torch.float64)[:, None] for x in ([-0.9, 0.2], [-0.9, -0.9, 0.2]))
    assert histogram_kl(one, other, right_edge="open").item() == 0  # the largest is dropped in spite of rounding
    assert isnan(histogram_kl(torch.ones(3, 1), torch.zeros(3, 1), right_edge="open").item())


def test_the_floor_of_two_samples_of_one_law_shrinks_with_their_size() -> None:
    means = []
    for n in (20, 100, 2000):
        draws = torch.randn(2, n, 50, generator=generator("floor", n))
        means.append(histogram_kl(*draws).mean().item())
    assert means[0] > means[1] > 10 * means[2] > 0


@pytest.mark.parametrize(("a", "b"), [((3,), (3,)), ((3, 2), (3, 1)), ((0, 2), (3, 2))])
def test_histograms_of_other_shapes_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(EngramError, match="histograms want"):
        histogram_kl(torch.zeros(a), torch.zeros(b))


def test_kl_and_js_against_scipy_and_at_their_ends() -> None:
    p, q = softmax(1), softmax(2)
    middle = (p + q) / 2
    assert kl(p, q).numpy() == pytest.approx(entropy(p, q, axis=1))
    halves = (entropy(p, middle, axis=1) + entropy(q, middle, axis=1)) / 2
    assert js(p, q).numpy() == pytest.approx(halves) and torch.equal(js(p, q), js(q, p))
    one, other = torch.eye(2)
    assert kl(one, other) == inf and kl(one, one) == js(one, one) == 0
    assert js(one, other).item() == pytest.approx(log(2)) and js(p.view(7, 1, 4), q.view(7, 1, 4)).shape == (7, 1)
    assert activation_distance(one[None], other[None]) == pytest.approx(sqrt(2))
    assert activation_distance(one[None], other[None], 1) == 2
    assert activation_distance(p, p) == 0 and zrf(p, p) == zrf(p, p, as_published=True) == 1


@given(SAMPLES, SAMPLES, st.integers(-8, 8))
@settings(max_examples=25, deadline=None)
def test_wasserstein_is_that_of_scipy_and_a_shift_is_itself(a: list[float], b: list[float], shift: int) -> None:
    one, other = torch.tensor(a), torch.tensor(b)
    assert wasserstein(one, other) == pytest.approx(wasserstein_distance(a, b), abs=1e-12)
    assert wasserstein(one[:, None], other) == pytest.approx(wasserstein(other, one), abs=1e-12)
    assert wasserstein(one, one + shift) == pytest.approx(abs(shift), abs=1e-12)


@pytest.mark.parametrize("shape", [(0,), (3, 2), ()])
def test_wasserstein_wants_samples_of_one_number(shape: tuple[int, ...]) -> None:
    with pytest.raises(EngramError, match="one number each"):
        wasserstein(torch.zeros(shape), torch.zeros(2))
