"""Samplers against what they promise, counted."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from engram.data.sampling import endless, paired, weighted
from engram.data.table import Table
from engram.errors import EngramError


def table(n: int) -> Table:
    return Table({"values": torch.arange(float(n))[:, None]})


@given(forget=st.integers(1, 20), retain=st.integers(1, 20), size=st.integers(1, 8), ratio=st.floats(0.1, 3.0))
@settings(max_examples=25, deadline=None)
def test_one_pass_over_the_forget_rows_each_with_its_share_of_retain_rows(
    forget: int, retain: int, size: int, ratio: float
) -> None:
    pairs = list(paired(table(forget), table(retain), size, ratio, seed=1))
    assert sorted(row for batch, _ in pairs for row in batch.rows.tolist()) == list(range(forget))
    drawn: Counter[int] = Counter()
    for batch, beside in pairs:
        assert beside is not None and len(beside) == max(1, round(ratio * len(batch)))
        drawn.update(beside.rows.tolist())
    counts = [drawn[row] for row in range(retain)]
    assert max(counts) - min(counts) <= 1  # none comes again before all have come


def test_without_retain_rows_there_is_nothing_beside() -> None:
    pairs = list(paired(table(5), None, 2))
    assert [len(batch) for batch, _ in pairs] == [2, 2, 1]
    assert all(beside is None for _, beside in pairs)


def test_a_retain_table_without_rows_is_an_error() -> None:
    with pytest.raises(EngramError, match="no rows to draw from"):
        list(paired(table(5), table(0), 2))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(**settings: int) -> list[list[int]]:
        pairs = paired(table(9), table(9), 4, **settings)  # type: ignore[arg-type]
        return [batch.rows.tolist() for pair in pairs for batch in pair if batch is not None]

    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert order(seed=1, epoch=2) != order(seed=1, epoch=3) != order(seed=2, epoch=2)


def test_the_processes_together_have_the_pairs_of_one() -> None:
    whole = list(paired(table(11), table(7), 4, 1.5, seed=3))
    parts = [list(paired(table(11), table(7), 4, 1.5, seed=3, shard=(rank, 2))) for rank in range(2)]
    for pair, left, right in zip(whole, *parts, strict=True):
        for one, a, b in zip(pair, left, right, strict=True):
            assert one is not None and a is not None and b is not None
            assert sorted(one.rows.tolist()) == sorted(a.rows.tolist() + b.rows.tolist())


def test_endless_rounds() -> None:
    rounds = list(islice(endless(5, "key", 1), 15))
    assert [sorted(rounds[start : start + 5]) for start in (0, 5, 10)] == [list(range(5))] * 3
    assert rounds == list(islice(endless(5, "key", 1), 15)) != list(islice(endless(5, "key", 2), 15))


def test_weighted_draws_have_the_chances_of_drawing_one_after_the_other() -> None:
    weights, draws = torch.tensor([1.0, 2.0, 0.0, 5.0], dtype=torch.float64), torch.Generator().manual_seed(1)
    pairs = Counter(tuple(weighted(weights, 2, draws).tolist()) for _ in range(4000))
    chances = {(a, b): weights[a] / 8 * weights[b] / (8 - weights[a]) for a in (0, 1, 3) for b in (0, 1, 3) if a != b}
    assert set(pairs) == set(chances)
    assert chisquare([pairs[p] for p in chances], [4000 * float(c) for c in chances.values()]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("weights", "k"), [([1.0, 0.0, 2.0], 3), ([1.0, -1.0], 1), ([1.0, float("nan")], 1), ([1.0], 2)]
)
def test_draws_that_are_not_possible(weights: list[float], k: int) -> None:
    with pytest.raises(EngramError, match=f"cannot draw {k} rows"):
        weighted(torch.tensor(weights), k, torch.Generator().manual_seed(0))
