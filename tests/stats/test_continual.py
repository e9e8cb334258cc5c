"""The worked matrix of the protocol, what must hold for any matrix, splits and class orders."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engram.errors import EngramError
from engram.stats import continual as c

R = np.array([[0.9, 0.1, 0.2, 0.1], [0.6, 0.8, 0.3, 0.2], [0.5, 0.85, 0.7, 0.25], [0.45, 0.6, 0.75, 0.9]])
DROPS = (c.forgetting, c.clipped_forgetting, c.backward_transfer, c.smith_forgetting, c.coda_forgetting)
MATRICES = st.integers(1, 6).flatmap(lambda T: arrays(float, (T, T), elements=st.floats(0, 1)))


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        (c.average_accuracy, 0.675),
        (c.average_incremental, 0.7395833),
        (c.forgetting, 0.2166667),
        (c.clipped_forgetting, 0.2333333),
        (c.backward_transfer, -0.20),
        (lambda R: c.forward_transfer(R, [0.25] * 4), -0.0333333),
        (c.learning_accuracy, 0.825),
        (c.smith_forgetting, 0.1388889),
        (lambda R: c.smith_forgetting(R, [10] * 4), 0.1388889),
        (c.coda_forgetting, 0.1361111),
    ],
)
def test_the_worked_matrix(metric: Callable[[np.ndarray], float], value: float) -> None:
    assert metric(R) == pytest.approx(value, abs=5e-8)


def test_the_worked_matrix_after_each_experience() -> None:
    assert [c.average_accuracy(R, i) for i in (1, 2, 3, 4)] == pytest.approx([0.90, 0.70, 0.683333, 0.675], abs=5e-7)
    assert [c.forgetting(R, k) for k in (2, 3, 4)] == pytest.approx([0.30, 0.175, 0.2166667], abs=5e-8)
    assert c.forgetting_by_task(R) == pytest.approx([0.45, 0.25, -0.05])
    assert c.forgetting_by_task(R, clipped=True) == pytest.approx([0.45, 0.25, 0])
    assert c.intransigence(R, [0.9, 0.9, 0.8, 0.7]) == pytest.approx([0, 0.1, 0.1, -0.2])


def test_task_mean_and_sample_mean_differ_where_sizes_do() -> None:
    base = np.array([[0.85, nan], [0.80, 0.20]])
    assert c.average_accuracy(base) == pytest.approx(0.50)
    assert c.sample_accuracy(base, [50, 10]) == pytest.approx(0.70)
    assert c.average_incremental(base, [50, 10]) == pytest.approx((0.85 + 0.70) / 2)
    assert c.smith_forgetting(base, [50, 10]) == pytest.approx(50 / 60 * 0.05)


def test_anytime_counts_every_point_and_worst_case_those_since_a_task_was_learnt() -> None:
    points = [[0.9, 0.0], [0.2, 0.3], [0.6, 0.8]]
    assert c.anytime([0.9, 0.25, 0.7]) == pytest.approx(1.85 / 3)
    assert c.worst_case(points, [0, 2]) == pytest.approx((0.2 + 0.8) / 2)
    assert c.worst_case(points, [0, 1]) == pytest.approx((0.2 + 0.3) / 2)


@given(MATRICES)
@settings(max_examples=25, deadline=None)
def test_the_best_is_at_least_the_diagonal_and_clipping_is_at_zero(table: np.ndarray) -> None:
    T = len(table)
    raw, clipped = c.forgetting_by_task(table), c.forgetting_by_task(table, clipped=True)
    assert (raw >= (table.diagonal() - table[-1])[: T - 1]).all()
    assert clipped.tolist() == np.maximum(raw, 0).tolist()


@given(MATRICES, st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_what_was_not_learnt_yet_and_the_order_of_the_tests_do_not_count(table: np.ndarray, draws: object) -> None:
    T = len(table)
    lower = np.where(np.tri(T, dtype=bool), table, nan)
    sizes = np.arange(1, T + 1)
    metrics: tuple[Callable[[np.ndarray], float], ...] = (*DROPS, c.average_accuracy, c.average_incremental)
    for metric in (*metrics, c.learning_accuracy, lambda R: c.sample_accuracy(R, sizes)):
        assert metric(lower) == metric(table) or T == 1
    order = np.array(draws.sample(range(T), T))  # type: ignore[attr-defined]
    assert c.average_accuracy(table[:, order]) == pytest.approx(c.average_accuracy(table))
    assert c.sample_accuracy(table[:, order], sizes[order]) == pytest.approx(c.sample_accuracy(table, sizes))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_the_sample_mean_is_that_of_one_pass(counts: list[tuple[int, int]]) -> None:
    sizes, hits = np.array([n for n, _ in counts]), np.array([min(pair) for pair in counts])
    table = np.tile(hits / sizes, (len(sizes), 1))
    assert c.sample_accuracy(table, sizes) == pytest.approx(hits.sum() / sizes.sum())


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
@settings(max_examples=25, deadline=None)
def test_nothing_is_forgotten_where_nothing_changes(row: list[float]) -> None:
    table = np.tile(row, (len(row), 1))
    assert [metric(table) for metric in DROPS] == [0] * len(DROPS)
    assert c.forward_transfer(table, row) == 0


def test_what_one_experience_leaves_undefined_is_nan() -> None:
    one = [[0.7]]
    assert all(isnan(metric(one)) for metric in DROPS)
    assert isnan(c.forward_transfer(one, [0.5])) and isnan(c.anytime([])) and isnan(c.forgetting(R, 1))
    assert c.average_accuracy(one) == c.average_incremental(one) == c.learning_accuracy(one) == 0.7


@pytest.mark.parametrize(("table", "i"), [(np.ones((2, 3)), None), (np.ones(3), None), (R, 0), (R, 5), ([], None)])
def test_what_is_no_accuracy_matrix_is_refused(table: np.ndarray, i: int | None) -> None:
    with pytest.raises(EngramError, match="square" if i is None else "counted from 1"):
        c.average_accuracy(table, i)


@pytest.mark.parametrize(
    ("total", "base", "increment", "sizes"),
    [
        (100, 50, 10, [50] + [10] * 5),
        (100, 50, 5, [50] + [5] * 10),
        (100, 40, 3, [40] + [3] * 20),
        (100, 40, 1, [40] + [1] * 60),
        (10, 4, 4, [4, 4, 2]),
        (10, 5, 5, [5, 5]),
        (100, 0, 10, [10] * 10),
        (10, 10, 2, [10]),
        (3, 0, 5, [3]),
    ],
)
def test_splits(total: int, base: int, increment: int, sizes: list[int]) -> None:
    assert c.split_sizes(total, base, increment) == c.split_sizes(total, base, increment, len(sizes)) == sizes
    with pytest.raises(EngramError, match=f"are {len(sizes)} tasks, not {len(sizes) + 1}"):
        c.split_sizes(total, base, increment, len(sizes) + 1)


@pytest.mark.parametrize(("total", "base", "increment"), [(10, 11, 1), (10, -1, 1), (10, 2, 0)])
def test_impossible_splits(total: int, base: int, increment: int) -> None:
    with pytest.raises(EngramError, match="cannot split"):
        c.split_sizes(total, base, increment)


@pytest.mark.parametrize(
    ("classes", "convention", "seed", "start"),
    [
        (100, "pycil", 1993, [68, 56, 78, 8, 23, 84, 90, 65, 74, 76, 40, 89, 3, 92, 55]),
        (10, "pycil", 1993, [4, 2, 7, 6, 0, 3, 5, 8, 9, 1]),
        (10, "coda", 1, [6, 8, 9, 7, 5, 3, 0, 4, 1, 2]),
        (10, "coda", 0, list(range(10))),
        (10, "natural", 5, list(range(10))),
        (100, "icarl", 0, [87, 0, 52, 58, 44, 91, 68, 97, 51, 15]),
    ],
)
def test_class_orders(classes: int, convention: c.Convention, seed: int, start: list[int]) -> None:
    order = c.class_order(classes, convention, seed)
    assert order[: len(start)] == start and sorted(order) == list(range(classes))


@pytest.mark.parametrize("seed", [0, 1993])
def test_mammoth_reads_the_permutation_of_pycil_as_a_map(seed: int) -> None:
    lists, maps = c.class_order(10, "pycil", seed), c.class_order(10, "mammoth", seed)
    assert [lists[old] for old in maps] == list(range(10)) != lists
    avalanche = c.class_order(10, "avalanche", seed)
    assert sorted(avalanche) == list(range(10)) and avalanche not in (lists, maps)


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(EngramError, match="pycl"):
        c.class_order(10, "pycl")  # type: ignore[arg-type]
    with pytest.raises(EngramError, match="icarl order is for 100"):
        c.class_order(10, "icarl")
