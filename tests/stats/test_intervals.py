"""Intervals against their definitions, counted coverage, and the comparison with oracles."""

from __future__ import annotations

from math import floor, hypot, inf, isnan, nan, sqrt

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm, t

from engram.errors import EngramError
from engram.stats.intervals import (
    Comparison,
    Estimate,
    Interval,
    auc,
    bootstrap,
    equivalence,
    holm,
    mean,
    proportion,
    tpr_at,
)

FIVE = (0.89, 0.90, 0.90, 0.90, 0.91)
SPREAD = t.ppf(0.975, 4) * sqrt(0.00005) * sqrt(1.2)
SCORES = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12)


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (1, 5), (3, 5), (5, 5), (17, 200)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_clopper_pearson_ends_where_the_tails_are_spent(hits: int, n: int, level: float) -> None:
    found = proportion(hits, n, level)
    assert found.value == hits / n and found.n == n
    if hits > 0:
        assert binom.sf(hits - 1, n, found.low) == pytest.approx((1 - level) / 2)
    if hits < n:
        assert binom.cdf(hits, n, found.high) == pytest.approx((1 - level) / 2)
    assert (hits > 0 or found.low == 0) and (hits < n or found.high == 1)


@pytest.mark.parametrize("n", [1, 5, 20, 60])
@pytest.mark.parametrize("p", [0.001, 0.03, 0.25, 0.5, 0.9])
def test_clopper_pearson_covers_at_least_the_level(n: int, p: float) -> None:
    covered = [found.low <= p <= found.high for found in (proportion(hits, n) for hits in range(n + 1))]
    assert binom.pmf(range(n + 1), n, p) @ covered >= 0.95


def test_a_proportion_of_nothing_says_nothing() -> None:
    found = proportion(0, 0)
    assert isnan(found.value) and found.interval == Interval(0, 1)
    with pytest.raises(EngramError, match="no proportion"):
        proportion(3, 2)


def test_the_mean_has_the_t_interval() -> None:
    x = np.array([0.2, 0.5, 0.9, 0.4])
    low, high = t.interval(0.9, 3, x.mean(), x.std(ddof=1) / 2)
    found = mean(x, 0.9)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((0.5, low, high, 4))
    assert mean([0.7]) == Estimate(0.7, -inf, inf, 1)
    assert isnan(mean([]).value)


@given(SCORES, SCORES)
@settings(max_examples=25, deadline=None)
def test_auc_counts_pairs_and_ties_by_half(pos: list[float], neg: list[float]) -> None:
    found, mirrored = auc(pos, neg), auc(neg, pos)
    pairs = [(a > b) + (a == b) / 2 for a in pos for b in neg]
    assert found.value == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert 0 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-9)


def test_auc_ends_solve_the_score_equation() -> None:
    found = auc([0.9, 0.8, 0.7, 0.4], [0.85, 0.5, 0.3, 0.2, 0.1, 0.05])
    assert found.value == pytest.approx(0.8333, abs=5e-5) and found.n == 10
    for end in (found.low, found.high):
        q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)
        variance = (end * (1 - end) + 4 * (q1 - end**2) + 4 * (q2 - end**2)) / 24  # 4: half of 10 rows, less 1
        assert (found.value - end) ** 2 == pytest.approx(norm.ppf(0.975) ** 2 * variance, rel=1e-6)


def test_auc_of_separated_sides_is_not_certain() -> None:
    few, many = auc([2.0] * 3, [1.0] * 3), auc([2.0] * 300, [1.0] * 300)
    assert few.value == few.high == many.value == many.high == 1
    assert few.low < 0.7 and 0.97 < many.low < 1
    with pytest.raises(EngramError, match="each side"):
        auc([], [1.0])


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_auc_covers_about_as_often_as_it_says(shift: float) -> None:
    draws, true = np.random.default_rng(1), norm.cdf(shift / sqrt(2))
    found = [auc(draws.normal(shift, 1, 30), draws.normal(0, 1, 40)) for _ in range(300)]
    covered = sum(e.low <= true <= e.high for e in found)
    assert 0.92 <= covered / 300 <= 0.99


def test_a_rate_at_a_rate() -> None:
    members, others = [0.9, 0.8, 0.7, 0.4], [0.85, 0.5, 0.3, 0.2, 0.1, 0.05]
    assert tpr_at(members, others, 0).value == 0.25
    assert tpr_at(members, others, 1 / 6).value == 0.75
    assert tpr_at(members, others, 0.99).value == tpr_at(members, others, 1.0).value == 1
    with pytest.raises(EngramError, match="both sides"):
        tpr_at(members, [], 0.1)


@given(SCORES, SCORES, st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_a_rate_at_a_rate_against_every_threshold(pos: list[float], neg: list[float], fpr: float) -> None:
    allowed = floor(fpr * len(neg) + 1e-9)
    fair = [cut for cut in (-inf, *neg) if sum(score > cut for score in neg) <= allowed]
    found = tpr_at(pos, neg, fpr)
    assert found.value == sum(score > min(fair) for score in pos) / len(pos)
    assert found.low <= found.value <= found.high


def test_a_rate_at_a_rate_covers_the_true_one_and_narrows_with_rows() -> None:
    draws, true, widths = np.random.default_rng(2), norm.sf(norm.isf(0.1) - 1.5), {}
    for n in (60, 1000):
        found = [tpr_at(draws.normal(1.5, 1, n), draws.normal(0, 1, n), 0.1) for _ in range(100)]
        assert sum(e.low <= true <= e.high for e in found) >= 95
        widths[n] = float(np.mean([e.high - e.low for e in found]))
    assert widths[1000] < 0.25 < widths[60] / 1.5
    few, many = (tpr_at(draws.normal(9, 1, 50), draws.normal(0, 1, n), 0.01) for n in (50, 1000))
    assert few.value == many.value == 1
    assert few.low == 0 and many.low > 0.9  # 50 rows say nothing of a rate of 1 %


def test_a_rate_at_a_rate_is_sure_of_nothing_among_equal_scores() -> None:
    assert tpr_at([1.0] * 50, [1.0] * 1000, 0.5) == Estimate(0, 0, proportion(0, 50, 0.975).high, 50)


def test_bootstrap_is_a_function_of_its_generator_and_near_the_t_interval() -> None:
    x, calls = np.random.default_rng(0).normal(3, 2, (80, 2)), []

    def statistic(rows: np.ndarray) -> float:
        calls.append(rows.shape)
        return float(rows.mean())

    found, again, other = (bootstrap(x, statistic, np.random.default_rng(s), resamples=500) for s in (1, 1, 2))
    assert found == again != other and calls == [(80, 2)] * 1503
    by_t = mean(x.mean(1))
    assert (found.value, found.n) == (pytest.approx(by_t.value), 80)
    assert (found.low, found.high) == pytest.approx((by_t.low, by_t.high), abs=0.08)
    narrow = bootstrap(x, statistic, np.random.default_rng(1), level=0.5, resamples=500)
    assert found.low < narrow.low < narrow.high < found.high


def test_the_halves_are_added_in_squares_on_each_side() -> None:
    found = equivalence(0.92, (0.91, 0.95), 1000, FIVE, 0.05)
    assert found.difference == pytest.approx(0.02)
    assert found.spread == pytest.approx(SPREAD)
    assert found.low == pytest.approx(0.02 - hypot(0.01, SPREAD))
    assert found.high == pytest.approx(0.02 + hypot(0.03, SPREAD))


def test_errors_in_every_form_say_the_same() -> None:
    forms = [(0.90, 0.94), Interval(0.90, 0.94), Estimate(0.92, 0.90, 0.94, 100), 0.02 / t.ppf(0.975, 99)]
    found = [equivalence(0.92, error, 100, FIVE, 0.05) for error in forms]
    assert [(e.low, e.high) for e in found] == [pytest.approx((found[0].low, found[0].high))] * 4


@pytest.mark.parametrize("error", [0.0, 0.5, 2.0])
def test_a_fresh_draw_of_the_same_law_is_covered_about_as_often_as_the_level_says(error: float) -> None:
    draws, n, covered = np.random.default_rng(3), 3000, 0
    half = float(norm.ppf(0.975)) * error
    for _ in range(n):
        value = draws.normal() + error * draws.normal()
        found = equivalence(value, (value - half, value + half), 100, draws.normal(size=5), 1.0)
        covered += found.low <= 0 <= found.high
    assert binomtest(covered, n, 0.95).pvalue > 1e-3 if error == 0 else 0.94 < covered / n < 0.975


@pytest.mark.parametrize("side", [-1, 1])
def test_far_away_lies_outside(side: int) -> None:
    draws = np.random.default_rng(4)
    for _ in range(50):
        found = equivalence(side * 30, 0.1, 100, draws.normal(size=5).tolist(), 1.0)
        assert side * found.difference > 0 and min(side * found.low, side * found.high) > 1.0


@given(
    shift=st.floats(-0.1, 0.1), below=st.floats(0.001, 0.1), above=st.floats(0.001, 0.1), scale=st.sampled_from([0, 1])
)
@settings(max_examples=25, deadline=None)
def test_the_rows_needed_are_the_fewest_that_decide(shift: float, below: float, above: float, scale: int) -> None:
    oracles, margin, n = [0.9 + scale * (x - 0.9) for x in FIVE], 0.05, 1000
    rooms = margin - abs(shift), abs(shift) - margin  # to fit inside, to lie outside
    assume(min(abs(room - scale * SPREAD) for room in rooms) > 1e-6)

    def compared(rows: int) -> Comparison:
        shrink, value = sqrt(n / rows), 0.9 + shift
        return equivalence(value, (value - below * shrink, value + above * shrink), rows, oracles, margin)

    def decided(rows: int) -> tuple[bool, bool]:
        e, limit = compared(rows), margin - 1e-9
        return -margin - 1e-9 <= e.low and e.high <= margin + 1e-9, e.low > limit or e.high < -limit

    for which, rows in enumerate((compared(n).n_needed, compared(n).n_outside)):
        assert (rows is None) == (rooms[which] < scale * SPREAD)
        if rows is not None:
            fewer = int(0.9 * (rows - 1))
            assert decided(rows)[which] and not (fewer and decided(fewer)[which])


def test_one_oracle_decides_nothing() -> None:
    found = equivalence(0.9, 0.001, 1000, [0.9], 0.05)
    assert (found.low, found.high, found.spread) == (-inf, inf, inf)
    assert found.n_needed is found.n_outside is None


@pytest.mark.parametrize(("value", "error"), [(nan, (0.8, 0.9)), (inf, (0.8, 0.9)), (0.9, (nan, 0.95)), (0.9, 1e999)])
def test_what_was_not_measured_leaves_an_open_interval(value: float, error: tuple[float, float] | float) -> None:
    found = equivalence(value, error, 100, FIVE, 0.05)
    assert found.low == -inf and found.n_needed is None


@pytest.mark.parametrize(("oracles", "margin"), [((), 0.05), (FIVE, -0.1), (FIVE, nan)])
def test_no_comparison_without_oracles_or_margin(oracles: tuple[float, ...], margin: float) -> None:
    with pytest.raises(EngramError, match="equivalence needs"):
        equivalence(0.9, 0.01, 100, oracles, margin)


@pytest.mark.parametrize(
    ("p_values", "fallen"),
    [
        ([0.01, 0.04, 0.03, 0.005], [True, False, False, True]),  # .005 <= .0125, .01 <= .0167, .03 > .025
        ([0.04, 0.04], [False, False]),
        ([0.05, 0.025], [True, True]),
        ([0.02, 0.001, nan], [True, True, False]),
        ([nan, 0.001, nan, 0.012, 0.02], [False, True, False, True, False]),  # .02 > .0167
        ([], []),
    ],
)
def test_holm_by_hand(p_values: list[float], fallen: list[bool]) -> None:
    assert holm(p_values) == fallen
