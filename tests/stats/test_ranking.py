"""Retrieval quality: the worked table, scikit-learn's average precision, and queries in their own gallery."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score

from engram.errors import EngramError
from engram.stats.ranking import QUERIES, cmc_map
from engram.stats.seeds import generator

D = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.5], [0.9, 0.2, 0.3, 0.1, 0.8], [0.3, 0.2, 0.1, 0.5, 0.4]])
Q, G = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1, 1, 0])


def test_the_worked_table() -> None:
    found = cmc_map(D, Q, G, ks=(1, 2))
    assert found.average_precision.tolist() == pytest.approx([0.7, 0.833333, 0.638889], abs=5e-7)
    assert found.map == pytest.approx(0.724074, abs=5e-7)
    assert found.cmc == {1: pytest.approx(2 / 3), 2: 1}


@pytest.mark.parametrize("seed", range(5))
def test_without_ties_it_is_the_average_precision_of_scikit_learn(seed: int) -> None:
    draws = generator("ranking", seed)
    dist, q, g = torch.rand(6, 30, generator=draws), torch.arange(6) % 3, torch.arange(30) % 4 % 3
    found = cmc_map(dist, q, g)
    known = [average_precision_score((g == q[i]).numpy(), -dist[i].numpy()) for i in range(6)]
    assert found.average_precision.tolist() == pytest.approx(known)
    order = torch.randperm(30, generator=draws)
    names = torch.tensor([5, 2, 9])
    again = cmc_map(dist[:, order], names[q], names[g[order]])
    assert again.cmc == found.cmc and torch.equal(again.average_precision, found.average_precision)


def test_equal_distances_keep_the_order_of_the_gallery() -> None:
    labels = torch.tensor([1, 0, 1])
    assert cmc_map(torch.zeros(1, 3), torch.tensor([0]), labels, ks=(1, 2)).cmc == {1: 0, 2: 1}
    assert cmc_map(torch.zeros(1, 3), torch.tensor([1]), labels).map == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_query_does_not_find_itself(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    dist = torch.randint(9, (5, 5), generator=generator("self")).to(dtype).fill_diagonal_(0)
    keep = ~torch.eye(5, dtype=torch.bool)
    by_hand = [cmc_map(dist[i][keep[i]][None], labels[i : i + 1], labels[keep[i]]) for i in range(4)]
    found = cmc_map(dist, labels, labels, drop_self=True)  # the last has no relevant row but itself
    assert found.average_precision.tolist() == [one.map for one in by_hand]
    assert found.cmc[1] == pytest.approx(sum(one.cmc[1] for one in by_hand) / 4)
    assert cmc_map(dist, labels, labels).cmc[1] == 1 and (dist.diagonal() == 0).all()


def test_a_query_is_no_rank_even_where_all_others_are_infinitely_far() -> None:
    dist, labels = torch.tensor([[0, torch.inf, 1], [torch.inf, 0, torch.inf], [1, 1, 0]]), torch.tensor([0, 0, 1])
    assert cmc_map(dist, labels, labels, drop_self=True).average_precision.tolist() == [0.5, 1]


def test_queries_without_a_relevant_row_are_left_out() -> None:
    found = cmc_map(D, torch.tensor([0, 7, 0]), G)
    assert found.average_precision.tolist() == pytest.approx([0.7, 0.638889], abs=5e-7)
    with pytest.raises(EngramError, match="no query has a relevant row"):
        cmc_map(D, torch.tensor([7, 7, 7]), G)
    with pytest.raises(EngramError, match="labels say"):
        cmc_map(D, Q, Q)


def test_queries_that_stand_somewhere_in_the_gallery_and_more_of_them_than_are_ranked_at_once() -> None:
    draws = generator("own rows")
    n = 2 * QUERIES + 3
    x, labels = torch.rand(n, 2, generator=draws, dtype=torch.float64), torch.arange(n) % 7
    dist = torch.cdist(x, x)
    order = torch.randperm(n, generator=draws)
    whole = cmc_map(dist, labels, labels, drop_self=True)
    moved = cmc_map(dist[:, order], labels, labels[order], drop_self=order.argsort())
    assert torch.allclose(moved.average_precision, whole.average_precision) and moved.cmc == whole.cmc
    for i in (0, QUERIES - 1, QUERIES, n - 1):
        rest = torch.arange(n) != i
        known = average_precision_score((labels[rest] == labels[i]).numpy(), -dist[i, rest].numpy())
        assert whole.average_precision[i].item() == pytest.approx(known)
    none = cmc_map(dist, labels, labels, drop_self=torch.full((n,), -1))
    assert torch.equal(none.average_precision, cmc_map(dist, labels, labels).average_precision)
