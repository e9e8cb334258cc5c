"""CKA: the worked numbers, the definition by Gram matrices, invariances; alarms of collapse."""

from __future__ import annotations

from math import exp, isnan, log

import pytest
import torch
from torch import Tensor

from engram.errors import EngramError
from engram.stats import similarity
from engram.stats.seeds import generator
from engram.stats.similarity import StreamingCKA, alignment, cka, effective_rank, uniformity

X = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0], [0, 3], [1, 2], [3, 1], [2, 2]])
Y = torch.tensor([1.0, 2, 0, 1, 4, 3, 2, 5])[:, None]


def random(n: int, d: int, *key: object) -> Tensor:
    return torch.randn(n, d, generator=generator("similarity", n, d, *key), dtype=torch.float64)


def by_gram(x: Tensor, y: Tensor, unbiased: bool) -> float:
    """HSIC as it is defined, from n x n Gram matrices."""
    n, K, L = len(x), x @ x.T, y @ y.T
    if not unbiased:
        H = torch.eye(n, dtype=x.dtype) - 1 / n
        return float((K @ H @ L @ H).trace()) / (n - 1) ** 2
    K, L = K.fill_diagonal_(0), L.fill_diagonal_(0)
    means = K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * K.sum(0) @ L.sum(0)
    return float((K @ L).trace() + means) / (n * (n - 3))


# The third is .41510595, which the protocol cuts to .415105
@pytest.mark.parametrize(
    ("n", "unbiased", "value"), [(5, False, 0.657384), (5, True, 0.327957), (8, False, 0.415106), (8, True, 0.417889)]
)
def test_worked_cka(n: int, unbiased: bool, value: float) -> None:
    assert cka(X[:n], Y[:n], unbiased=unbiased) == pytest.approx(value, abs=5e-7)


@pytest.mark.parametrize(("unbiased", "values"), [(False, [2.9725, 3.865, 5.29]), (True, [0.73333, 2.0, 2.5])])
def test_worked_hsic(unbiased: bool, values: list[float]) -> None:
    x, y = similarity._centred(X[:5]), similarity._centred(Y[:5])
    found = [similarity._hsic(a, b, unbiased) for a, b in ((x, y), (x, x), (y, y))]
    assert found == pytest.approx(values, abs=5e-6)


def test_worked_batches() -> None:
    stream = StreamingCKA()
    assert isnan(stream.compute())
    for start in (0, 4):
        stream.update(X[start : start + 4], Y[start : start + 4])
    stream.update(X[:3], Y[:3])  # too few for HSIC1: passed over
    assert (stream._sums / 2).tolist() == pytest.approx([-0.583333, 1.833333, 1.166667], abs=5e-7)
    assert stream.compute() == pytest.approx(-0.398862, abs=5e-7)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("n", "dx", "dy"), [(30, 3, 5), (6, 40, 25), (12, 2, 60)])
def test_cka_is_what_gram_matrices_give(n: int, dx: int, dy: int, unbiased: bool) -> None:
    x, y = random(n, dx) + 3, random(n, dy)  # HSIC does not see the shift
    y[:, 0] += x[:, 0]
    xy, xx, yy = by_gram(x, y, unbiased), by_gram(x, x, unbiased), by_gram(y, y, unbiased)
    assert cka(x, y, unbiased=unbiased) == pytest.approx(xy / (xx * yy) ** 0.5, abs=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_does_not_see_rotation_scale_and_shift_but_other_maps(unbiased: bool) -> None:
    x, y = random(40, 6), random(40, 4)
    y[:, :2] += x[:, :2]
    turned = 7 * x @ torch.linalg.qr(random(6, 6)).Q + torch.arange(6.0)
    value = cka(x, y, unbiased=unbiased)
    assert cka(turned, y, unbiased=unbiased) == pytest.approx(cka(y, x, unbiased=unbiased)) == pytest.approx(value)
    assert cka(x, turned, unbiased=unbiased) == pytest.approx(1)
    order = torch.randperm(40, generator=generator("order"))
    assert cka(x[order], y[order], unbiased=unbiased) == pytest.approx(value)
    assert abs(cka(x[order], y, unbiased=unbiased) - value) > 0.1
    assert abs(cka(x @ torch.tensor([1.0, 1, 1, 1, 1, 30]).double().diag(), y, unbiased=unbiased) - value) > 0.05


def test_only_the_biased_form_drifts_to_one_with_few_rows() -> None:
    pairs = [(random(8, 400, "x", i), random(8, 400, "y", i)) for i in range(20)]
    biased, unbiased = (sum(cka(x, y, unbiased=u) for x, y in pairs) / 20 for u in (False, True))
    assert biased > 0.9 and abs(unbiased) < 0.1


def test_a_constant_side_has_no_cka() -> None:
    same, stream = torch.full((7, 3), 0.7, dtype=torch.float64), StreamingCKA()  # whose mean is rounded
    stream.update(same, random(7, 3))
    assert all(isnan(value) for value in (cka(same, random(7, 3)), cka(random(7, 3), same), stream.compute()))


@pytest.mark.parametrize(("n", "m", "unbiased"), [(3, 3, True), (1, 1, False), (5, 6, True), (3, 2, False)])
def test_cka_wants_the_same_rows_and_enough_of_them(n: int, m: int, unbiased: bool) -> None:
    with pytest.raises(EngramError, match=f"got {n} and {m} rows"):
        cka(random(n, 2), random(m, 2), unbiased=unbiased)
    if unbiased and n != m:
        with pytest.raises(EngramError, match=f"got {n} and {m} rows"):
            StreamingCKA().update(random(n, 2), random(m, 2))


def test_effective_rank() -> None:
    axes = torch.cat([torch.eye(5), -torch.eye(5)])
    assert effective_rank(axes) == pytest.approx(5) == pytest.approx(effective_rank(3 * axes + 2))
    assert effective_rank(random(9, 1) @ random(1, 5)) == pytest.approx(1)
    assert effective_rank(torch.full((7, 3), 0.7, dtype=torch.float64)) == 0
    shares = torch.tensor([0.75, 0.25])
    two = torch.cat([shares.sqrt().diag(), -shares.sqrt().diag()])
    assert effective_rank(two) == pytest.approx(exp(-0.75 * log(0.75) - 0.25 * log(0.25)))


def test_alignment_and_uniformity() -> None:
    axes = torch.eye(3)
    assert alignment(axes, axes) == 0 and alignment(axes, axes.roll(1, 0)) == 2 and alignment(axes, -axes) == 4
    assert uniformity(torch.cat([axes[:1], -axes[:1]])) == -8
    assert uniformity(axes) == pytest.approx(-4)
    spread = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    assert uniformity(spread) == pytest.approx(log((2 * exp(-4) + exp(-8)) / 3))
    assert uniformity(axes[[0] * 101]) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("unbiased", [False, True])
def test_many_rows_are_taken_in_blocks(unbiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = random(50, 6) + 100, random(50, 4).float()
    y[:, :3] += x[:, :3].float()
    whole = cka(x, y, unbiased=unbiased)
    monkeypatch.setattr(similarity, "BLOCK", 7)
    assert cka(x, y, unbiased=unbiased) == pytest.approx(whole, abs=1e-9)
    assert cka(x, x, unbiased=unbiased) == pytest.approx(1)
    assert isnan(cka(torch.full((50, 3), 0.7, dtype=torch.float64), y, unbiased=unbiased))
