"""Ridge regression that learns and unlearns, against exact rational arithmetic and the numbers of the acu card."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.errors import EngramError
from engram.stats.ridge import Ridge
from engram.stats.seeds import generator


def rows(n: int, d: int, C: int, *key: object) -> tuple[Tensor, Tensor]:
    draws = generator("ridge", n, d, C, *key)
    phi = torch.randn(n, d, generator=draws, dtype=torch.float64).relu()
    return phi, torch.nn.functional.one_hot(torch.randint(C, (n,), generator=draws), C)


def learnt(phi: Tensor, y: Tensor, gamma: float = 0.1) -> Ridge:
    ridge = Ridge(phi.shape[1], gamma)
    ridge.add(phi, y)
    return ridge


def solved(phi: Tensor, y: Tensor, gamma: float) -> list[list[Fraction]]:
    """The ridge weights without any rounding, by Gauss and Jordan."""
    Phi, Y = ([[Fraction(v) for v in row] for row in x.double().tolist()] for x in (phi, y))
    d, columns = phi.shape[1], list(zip(*(a + b for a, b in zip(Phi, Y, strict=True)), strict=True))
    table = [[sum((a * b for a, b in zip(columns[i], c, strict=True)), Fraction(0)) for c in columns] for i in range(d)]
    for i in range(d):
        table[i][i] += Fraction(gamma)
    for i in range(d):
        table[i] = [v / table[i][i] for v in table[i]]
        for j in set(range(d)) - {i}:
            table[j] = [v - table[j][i] * w for v, w in zip(table[j], table[i], strict=True)]
    return [line[d:] for line in table]


def distance(W: Tensor, exact: list[list[Fraction]]) -> float:
    pairs = [(Fraction(a), b) for x, z in zip(W.tolist(), exact, strict=True) for a, b in zip(x, z, strict=True)]
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs))


def same(one: Ridge, other: Ridge) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


@given(
    order=st.permutations(range(18)),
    cuts=st.lists(st.integers(1, 17), max_size=3, unique=True),
    gone=st.sets(st.integers(0, 17), max_size=14),
    gamma=st.sampled_from([1e-3, 0.1, 10.0]),
)
@settings(max_examples=25, deadline=None)
def test_in_any_order_and_any_blocks_the_weights_are_within_the_bound_of_exact_ones(
    order: list[int], cuts: list[int], gone: set[int], gamma: float
) -> None:
    phi, y = rows(18, 4, 3)
    ridge = Ridge(4, gamma)
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 18], strict=True):
        ridge.add(phi[order[start:end]], y[order[start:end]])
    for row in sorted(gone, key=order.index):
        ridge.remove(phi[row : row + 1], y[row : row + 1])
    left = [row for row in range(18) if row not in gone]
    error = distance(ridge.weights, solved(phi[left], y[left], gamma))
    assert error <= ridge.error_bound() < 1e-6
    assert ridge.n == len(left) and ridge.count.tolist() == y[left].sum(0).tolist()


def test_the_relative_bound_holds_and_is_useful() -> None:
    phi, y = rows(40, 4, 2)
    ridge = learnt(phi, y)
    ridge.remove(phi[:25], y[:25])
    exact = solved(phi[25:], y[25:], 0.1)
    size = distance(torch.zeros(4, 2), exact)
    assert distance(ridge.weights, exact) / size <= ridge.residual_bound() < 1e-9
    assert ridge.residual_bound() >= ridge.error_bound() / (1.01 * size)


def test_the_numbers_of_the_card() -> None:
    d, m, C, N, gamma = 50, 200, 10, 1000, 0.1
    draws = generator("acu card")
    x, B = torch.randn(N, d, generator=draws, dtype=torch.float64), torch.rand(m, d, generator=draws).double()
    phi, y = (x @ ((2 * B - 1) / d**0.5).T).relu(), torch.eye(C)[torch.randint(C, (N,), generator=draws)].double()

    def reference(start: int) -> Tensor:
        part, eye = slice(start, None), torch.eye(m, dtype=torch.float64)
        return torch.linalg.solve(phi[part].T @ phi[part] + gamma * eye, phi[part].T @ y[part])

    forwards, backwards = Ridge(m, gamma), Ridge(m, gamma)
    for p, t in zip(phi.split(100), y.split(100), strict=True):
        forwards.add(p, t)
    for p, t in zip(reversed(phi.split(70)), reversed(y.split(70)), strict=True):
        backwards.add(p, t)
    for ridge in (forwards, backwards):
        assert (ridge.weights - reference(0)).abs().max() < 1e-9
    for p, t in zip(phi[:500].split(50), y[:500].split(50), strict=True):
        forwards.remove(p, t)
    assert (forwards.weights - reference(500)).abs().max() < 1e-8
    assert forwards.error_bound() < 1e-6
    R = torch.linalg.inv(phi[500:].T @ phi[500:] + gamma * torch.eye(m, dtype=torch.float64))
    assert (torch.linalg.inv(forwards.A) - R).abs().max() < 1e-8
    singly, once = learnt(phi, y), learnt(phi, y)
    for row in range(10):
        singly.remove(phi[row : row + 1], y[row : row + 1])
    once.remove(phi[:10], y[:10])
    assert (singly.weights - once.weights).abs().max() < 1e-9
    forwards.remove(phi[500:], y[500:])
    assert forwards.weights.abs().max() == 0
    assert torch.equal(forwards.A, gamma * torch.eye(m, dtype=torch.float64))


def test_learning_and_unlearning_gives_back_the_weights() -> None:
    phi, y = rows(60, 5, 3)
    ridge, before = learnt(phi[:40], y[:40]), learnt(phi[:40], y[:40])
    ridge.add(phi[40:], y[40:])
    assert (ridge.weights - before.weights).abs().max() > 1e-3
    ridge.remove(phi[40:], y[40:])
    assert (ridge.weights - before.weights).norm() <= ridge.error_bound() + before.error_bound() < 1e-9


def test_without_rows_the_state_is_zero_exactly_and_as_good_as_new() -> None:
    phi, y = rows(50, 6, 3)
    ridge = learnt(phi, y)
    for part in torch.randperm(50, generator=generator("order")).split(7):
        ridge.remove(phi[part], y[part])
    assert same(ridge, Ridge(6, outputs=3))
    assert ridge.weights.abs().max() == ridge.error_bound() == ridge.residual_bound() == 0
    ridge.add(phi, y)
    assert same(ridge, learnt(phi, y))


def test_a_class_without_rows_has_a_column_of_zeros() -> None:
    phi, y = rows(60, 5, 3)
    of_class = y[:, 1] == 1
    ridge = learnt(phi, y)
    ridge.remove(phi[of_class], y[of_class])
    assert ridge.count[1] == 0 and (ridge.Q[:, 1] == 0).all() and (ridge.weights[:, 1] == 0).all()
    refit = learnt(phi[~of_class], y[~of_class])
    assert (ridge.weights - refit.weights).norm() <= ridge.error_bound() + refit.error_bound() < 1e-9


def test_columns_grow_and_missing_ones_are_zeros() -> None:
    phi, y = rows(30, 4, 5)
    y[:10] = torch.nn.functional.one_hot(torch.arange(10) % 2, 5)
    grown, whole = learnt(phi[:10], y[:10, :2]), learnt(phi[:10], y[:10])
    grown.add(phi[10:], y[10:])
    grown.remove(phi[:10], y[:10, :2])
    whole.add(phi[10:], y[10:])
    whole.remove(phi[:10], y[:10])
    assert grown.Q.shape == (4, 5) and same(grown, whole)


def test_real_targets_and_float32_rows() -> None:
    draws = generator("real")
    phi, y = torch.randn(20, 3, generator=draws), torch.randn(20, 2, generator=draws)
    ridge = learnt(phi, y)
    ridge.remove(phi[:5], y[:5])
    assert distance(ridge.weights, solved(phi[5:], y[5:], 0.1)) <= ridge.error_bound() < 1e-12


PHI, Y = rows(12, 4, 2)
FEW = int(Y.sum(0).argmin())  # the smaller class


@pytest.mark.parametrize(
    ("phi", "y"),
    [
        (10 * PHI[:1] + 1, Y[:1]),  # rows never learnt
        (PHI[:1] + torch.tensor([0, 0, 0, 5.0]), Y[:1]),
        (torch.cat([PHI, PHI]), torch.cat([Y, Y])),  # more rows than there are
        (PHI, Y.flip(1)),  # other labels
        (PHI + 1e-6, Y),  # what is left would be no sum of no rows
        (2 * PHI, Y / 2),  # the same Q
        (PHI[Y[:, FEW] == 0][: Y[:, FEW].sum()], Y[Y[:, FEW] == 1]),  # rows of one class as all of the other
        (PHI[:1], torch.tensor([[0, 0, 1]])),  # a class never learnt
        (PHI[:1], torch.tensor([[0.0, float("nan")]])),
        (PHI[:1] * float("inf"), Y[:1]),
        (PHI[:1, :3], Y[:1]),
        (PHI[:2], Y[:1]),
        (PHI[0], Y[0]),
    ],
)
def test_what_cannot_be_removed_leaves_the_state_untouched(phi: Tensor, y: Tensor) -> None:
    ridge = learnt(PHI, Y)
    weights = ridge.weights.clone()
    with pytest.raises(EngramError, match=r"never learnt|NaN or infinity|shapes"):
        ridge.remove(phi, y)
    assert same(ridge, learnt(PHI, Y)) and torch.equal(ridge.weights, weights)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_a_sum_would_never_lose_are_not_learnt(bad: float) -> None:
    ridge = learnt(PHI, Y)
    for phi, y in ((torch.full((1, 4), bad), Y[:1]), (PHI[:1], torch.full((1, 2), bad))):
        with pytest.raises(EngramError, match="NaN or infinity"):
            ridge.add(phi, y)
    assert same(ridge, learnt(PHI, Y))


def test_rows_computed_anew_need_drift_and_it_enters_the_bound() -> None:
    phi, y = rows(30, 4, 2)
    anew = phi * (1 + 1e-6 * torch.randn(phi.shape, generator=generator("drift")).clamp(-1, 1))
    strict, ridge = learnt(phi, y), learnt(phi, y)
    with pytest.raises(EngramError, match="never learnt"):
        strict.remove(anew, y)
    strict.remove(phi[:20], y[:20])
    ridge.remove(anew[:20], y[:20], drift=1e-5)
    error = distance(ridge.weights, solved(phi[20:], y[20:], 0.1))
    assert strict.error_bound() < 1e-9 < error <= ridge.error_bound() < 0.1
    ridge.remove(anew[20:], y[20:], drift=1e-5)
    assert ridge.weights.abs().max() == ridge.error_bound() == 0


def test_state_dict_and_back() -> None:
    phi, y = rows(30, 4, 3)
    ridge, again = learnt(phi, y, 0.5), Ridge(4)
    state = ridge.state_dict()
    again.load_state_dict(state)
    assert same(ridge, again) and again.gamma == 0.5 and again.error_bound() == ridge.error_bound() > 0
    again.remove(phi[:7], y[:7])
    assert same(ridge, learnt(phi, y, 0.5)) and not same(ridge, again)
    ridge.remove(phi[:7], y[:7])
    assert same(ridge, again) and torch.equal(ridge.weights, again.weights)


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_gamma_must_be_positive(gamma: float) -> None:
    with pytest.raises(EngramError, match="gamma > 0"):
        Ridge(3, gamma)


def test_a_gamma_lost_in_rounding_is_an_error_and_no_number() -> None:
    lost = learnt(torch.ones(3, 2), torch.ones(3, 1), 1e-30)
    with pytest.raises(EngramError, match="lost in rounding"):
        _ = lost.weights
