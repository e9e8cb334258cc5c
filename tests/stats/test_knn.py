"""Nearest neighbours against sorting by hand, with ties, in blocks of any size; votes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.errors import EngramError
from engram.stats.knn import Metric, nearest, vote
from engram.stats.seeds import generator

BANK = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]).double()
QUERY, CLASSES = torch.tensor([[0.6, 0.8]]).double(), torch.tensor([0, 0, 1, 1])
POINTS = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=3, max_size=9)


def similarities(q: Tensor, bank: Tensor, metric: Metric) -> Tensor:
    if metric == "l2":
        return -(q[:, None].double() - bank[None].double()).square().sum(2)
    return q @ bank.T if metric == "dot" else torch.cosine_similarity(q[:, None], bank[None], dim=2)


def test_the_worked_neighbours_and_votes() -> None:
    values, indices = nearest(QUERY, BANK, 4)
    assert values[0].tolist() == pytest.approx([0.96, 0.8, 0.6, 0.28]) and indices[0].tolist() == [1, 2, 0, 3]
    values, indices = nearest(QUERY, BANK, 3)
    assert vote(CLASSES[indices], values, 2, temperature=0.5)[0].tolist() == pytest.approx([10.1411, 4.9530], abs=5e-5)
    assert vote(CLASSES[indices], values, 3).tolist() == [[2, 1, 0]]


def test_of_equal_votes_the_lower_class_wins() -> None:
    assert vote(torch.tensor([[2, 1], [1, 2]]), torch.ones(2, 2), 3).argmax(1).tolist() == [1, 1]


@pytest.mark.parametrize("metric", ["dot", "l2"])
@given(points=POINTS, k=st.integers(1, 3), block=st.integers(1, 10))
@settings(max_examples=25, deadline=None)
def test_equal_values_keep_the_order_of_the_bank(
    metric: Metric, points: list[tuple[int, int]], k: int, block: int
) -> None:
    bank = torch.tensor(points).float()  # whole numbers: no rounding, many ties
    score = similarities(bank, bank, metric)
    order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    values, indices = nearest(bank, bank, k, metric=metric, block=block)
    assert torch.equal(indices, order)
    expected = score.gather(1, order)
    assert torch.equal(values.double(), expected.neg().sqrt() if metric == "l2" else expected.double())


@pytest.mark.parametrize("metric", ["dot", "l2"])
@given(points=POINTS, k=st.integers(1, 2), block=st.integers(1, 10))
@settings(max_examples=25, deadline=None)
def test_a_row_is_no_neighbour_of_itself(metric: Metric, points: list[tuple[int, int]], k: int, block: int) -> None:
    bank = torch.tensor(points).float()
    score = similarities(bank, bank, metric).fill_diagonal_(-torch.inf)
    _, indices = nearest(bank, bank, k, metric=metric, block=block, drop_self=True)
    assert torch.equal(indices, score.argsort(dim=1, descending=True, stable=True)[:, :k])


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("block", [1, 7, 30, 4096])
@pytest.mark.parametrize("drop_self", [False, True])
def test_random_rows_against_sorting(metric: Metric, block: int, drop_self: bool) -> None:
    bank = torch.randn(50, 6, generator=generator("bank"), dtype=torch.float64)
    q = bank if drop_self else torch.randn(23, 6, generator=generator("q"), dtype=torch.float64)
    score = similarities(q, bank, metric)
    if drop_self:
        score.fill_diagonal_(-torch.inf)
    top = score.topk(5, 1)
    values, indices = nearest(q, bank, 5, metric=metric, block=block, drop_self=drop_self)
    assert torch.equal(indices, top.indices)
    assert torch.allclose(values, top.values.neg().sqrt() if metric == "l2" else top.values, atol=1e-12)


def test_all_rows_of_the_bank_can_be_asked_for() -> None:
    _, indices = nearest(QUERY.half(), BANK.float(), 4, block=3)
    assert indices.sort(1).values.tolist() == [[0, 1, 2, 3]]
    _, indices = nearest(BANK, BANK, 3, drop_self=True, block=2)
    assert all(sorted([row, *found]) == [0, 1, 2, 3] for row, found in enumerate(indices.tolist()))


@pytest.mark.parametrize(
    ("q", "k", "drop_self", "message"),
    [
        (QUERY, 5, False, "lower k"),
        (BANK, 4, True, "lower k"),
        (QUERY[0], 1, False, "want"),
        (QUERY[:, :1], 1, False, "want"),
        (QUERY * torch.nan, 1, False, "NaN or infinity"),
    ],
)
def test_what_has_no_neighbours_is_refused(q: Tensor, k: int, drop_self: bool, message: str) -> None:
    with pytest.raises(EngramError, match=message):
        nearest(q, BANK, k, drop_self=drop_self)
