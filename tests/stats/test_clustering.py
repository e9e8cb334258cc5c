"""Clusters against classes: the worked table, every permutation, other names."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.errors import EngramError
from engram.stats.clustering import hungarian_accuracy, match
from engram.stats.seeds import generator

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=15)


def both(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    y, clusters = torch.tensor(pairs).T
    return y, clusters


def test_the_worked_table() -> None:
    y, clusters = (torch.tensor([int(digit) for digit in row]) for row in ("0001112222", "1120002212"))
    share, names = hungarian_accuracy(y, clusters)
    assert share == 0.8 and names == {1: 0, 0: 1, 2: 2}


@given(LABELS)
@settings(max_examples=25, deadline=None)
def test_it_is_the_best_of_all_maps(pairs: list[tuple[int, int]]) -> None:
    y, clusters = both(pairs)
    share, names = hungarian_accuracy(y, clusters)
    slots = [*range(4), -1]  # a cluster may stay without a class
    best = max(sum(to[c] == k for k, c in pairs) for to in permutations(slots))
    assert share == best / len(pairs)
    assert sum(names.get(c) == k for k, c in pairs) == best and len(set(names.values())) == len(names)


@given(LABELS, st.permutations([-7, 0, 3, 11, 90]))
@settings(max_examples=25, deadline=None)
def test_names_of_clusters_and_classes_do_not_count(pairs: list[tuple[int, int]], names: list[int]) -> None:
    y, clusters = both(pairs)
    renamed = hungarian_accuracy(torch.tensor(names)[y], torch.tensor(names)[clusters])
    assert renamed[0] == hungarian_accuracy(y, clusters)[0]
    assert set(renamed[1]) <= set(names) and set(renamed[1].values()) <= set(names)


def test_clusters_beyond_the_classes_are_errors() -> None:
    assert hungarian_accuracy(torch.tensor([0, 0, 0, 0]), torch.tensor([1, 1, 2, 3])) == (0.5, {1: 0})
    assert hungarian_accuracy(torch.tensor([0, 1, 2, 3]), torch.tensor([5, 5, 5, 5]))[0] == 0.25


@pytest.mark.parametrize(("a", "b"), [(3, 3), (2, 5), (5, 2)])
def test_a_match_costs_least(a: int, b: int) -> None:
    cost = torch.rand(a, b, generator=generator("match", a, b))
    rows, columns = match(cost)
    tall = cost if a >= b else cost.T
    least = min(sum(tall[i, j] for j, i in enumerate(order)) for order in permutations(range(max(a, b)), min(a, b)))
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == len(rows) == min(a, b)
    assert cost[rows, columns].sum().item() == pytest.approx(float(least))


@pytest.mark.parametrize(("y", "clusters"), [([], []), ([0, 1], [0]), ([[0]], [[0]])])
def test_what_is_no_pair_of_lists_is_refused(y: list[int], clusters: list[int]) -> None:
    with pytest.raises(EngramError, match="want to be"):
        hungarian_accuracy(torch.tensor(y), torch.tensor(clusters))
