"""The share of a lost ability that has come back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import EngramError
from engram.stats.recovery import recovered


def test_by_hand() -> None:
    found = recovered([1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0])
    assert (found.value, found.n) == (0.5, 4)
    # errors per row: (0, 1 - .5, 0 - .5, 0) / .5, sd sqrt(2 / 3), t quantile 3.1824 with 3 degrees of freedom
    half = 3.182446 * math.sqrt(2 / 3) / 2
    assert found.high == pytest.approx(0.5 + half, rel=1e-6) and found.low == pytest.approx(0.5 - half, rel=1e-6)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_nothing_recovered_is_0_and_everything_is_1_for_sure(rows: list[tuple[bool, bool]]) -> None:
    lost, whole = (torch.tensor([float(row[k]) for row in rows]) for k in (0, 1))
    none, all_of_it = recovered(lost, lost, whole), recovered(whole, lost, whole)
    if whole.mean() > lost.mean():
        assert (none.value, none.low, none.high) == (0, 0, 0)
        assert (all_of_it.value, all_of_it.low, all_of_it.high) == (1, 1, 1)
    else:
        assert math.isnan(none.value) and (all_of_it.low, all_of_it.high) == (-math.inf, math.inf)


def test_the_interval_covers() -> None:
    """400 draws of 200 rows: lost .2, whole .9, now .6, paired; truth 4 / 7."""
    draws, inside = np.random.default_rng(0), 0
    for _ in range(400):
        u = draws.random(200)
        now = np.where(draws.random(200) < 0.8, u, draws.random(200)) < 0.6
        found = recovered(now.astype(float), (u < 0.2).astype(float), (u < 0.9).astype(float))
        inside += found.low <= 4 / 7 <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_scores_of_different_rows_are_refused() -> None:
    with pytest.raises(EngramError, match="scores of the same rows, and there are 2, 1 and 2"):
        recovered([1, 0], [1], [1, 1])
