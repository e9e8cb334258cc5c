"""Membership attacks: the worked numbers, scikit-learn, and planted members."""

from __future__ import annotations

from math import inf, nan
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from engram.errors import EngramError
from engram.stats.intervals import auc, proportion
from engram.stats.membership import entropy_attack, logistic_attack, roc, threshold_attack, yeom_attack

MEMBERS, OTHERS = [0.1, 0.2, 0.3, 0.9], [0.25, 0.8, 1.2, 2.0]
LOSSES = st.lists(st.integers(0, 8).map(lambda v: v / 10), min_size=1, max_size=12)


def test_the_worked_threshold() -> None:
    best, yeom = threshold_attack(MEMBERS, OTHERS), yeom_attack(MEMBERS, OTHERS)
    assert (best.accuracy, best.threshold, best.auc.value) == (0.75, 0.2, 0.8125)
    assert (yeom.accuracy, yeom.threshold, yeom.auc) == (0.75, pytest.approx(0.375), best.auc)


@given(LOSSES, LOSSES)
@settings(max_examples=25, deadline=None)
def test_the_curve_and_the_area_are_those_of_scikit_learn(members: list[float], others: list[float]) -> None:
    truth, scores = np.repeat([1, 0], [len(members), len(others)]), [*members, *others]
    fpr, tpr, thresholds = roc_curve(truth, scores, drop_intermediate=False)
    found = roc(members, others)
    assert found.fpr == pytest.approx(fpr) and found.tpr == pytest.approx(tpr)
    assert found.thresholds.tolist() == thresholds.tolist() and found.thresholds[0] == inf
    assert auc(members, others).value == pytest.approx(roc_auc_score(truth, scores))


@given(LOSSES, LOSSES)
@settings(max_examples=100, deadline=None)
def test_no_threshold_does_better_and_no_smaller_one_as_well(members: list[float], others: list[float]) -> None:
    m, o, found = np.array(members), np.array(others), threshold_attack(members, others)
    hits = {cut: int((m <= cut).sum() * len(o) - (o <= cut).sum() * len(m)) for cut in (-inf, *members, *others)}
    most = max(hits.values())
    assert found.threshold == min(cut for cut, value in hits.items() if value == most)
    assert found.accuracy == pytest.approx(0.5 + most / len(m) / len(o) / 2)


def test_equal_thresholds_are_equal_in_spite_of_rounding() -> None:
    found = threshold_attack([1.0, 0.4, 0.5, 0.6, 1.1, 0.3], [0.7, 0.2, 0.6, 0.7, 0.7, 0.0])
    assert found.threshold == 0.5


@pytest.mark.parametrize("classifier", ["logistic", "svc"])
def test_the_worked_entropies(classifier: Literal["logistic", "svc"]) -> None:
    retain, test = [0.01, 0.02, 0.05, 0.1, 0.03, 0.02], [0.4, 0.9, 0.2, 0.7]
    found = entropy_attack(retain, test, [0.03, 0.5, 0.8, 0.15], classifier=classifier)
    assert found == proportion(2, 4)
    assert entropy_attack(retain, test, [0.02], classifier=classifier, level=0.5) == proportion(1, 1, 0.5)
    assert entropy_attack(retain, test, [0.9], classifier=classifier).value == 0


def test_planted_members_are_told_and_none_are_told_where_there_are_none() -> None:
    draws = np.random.default_rng(5)
    low, high, same = draws.exponential(0.2, 200), draws.exponential(1.0, 150), draws.exponential(1.0, 150)
    told, not_told = logistic_attack(low, high, seed=1), logistic_attack(same, high, seed=1)
    assert told.low > 0.6 and told.n == not_told.n == 300
    assert not_told.low < 0.5 < not_told.high and abs(not_told.value - 0.5) < 0.08
    around = proportion(round(told.value * 300), 300)
    assert (told.low, told.high) == (around.low, around.high)
    assert logistic_attack(np.zeros(20), np.ones(20) * 200, seed=0).value == 1
    assert logistic_attack(np.full(20, 150.0), np.full(20, 200.0), seed=0).value == 0.5  # both at the clip


def test_the_attack_is_a_function_of_its_seed() -> None:
    draws = np.random.default_rng(6)
    forget, test = draws.exponential(0.7, 60), draws.exponential(1.0, 90)
    found = [logistic_attack(forget, test, seed=seed) for seed in (1, 1, 2, 2**40)]
    assert found[0] == found[1] and len({e.value for e in found}) > 1
    assert logistic_attack(forget, test, seed=1, splits=5).n == 120
    narrow = logistic_attack(forget, test, seed=1, level=0.5)
    assert narrow.value == found[0].value and found[0].low < narrow.low < narrow.high < found[0].high


@pytest.mark.parametrize("attack", [threshold_attack, yeom_attack, lambda m, o: logistic_attack(m, o, seed=0)])
@pytest.mark.parametrize(("members", "others"), [([], [1.0]), ([1.0], []), ([nan], [1.0]), ([1.0], [nan])])
def test_losses_are_wanted_on_both_sides(attack: object, members: list[float], others: list[float]) -> None:
    with pytest.raises(EngramError, match="losses on both sides"):
        attack(members, others)  # type: ignore[operator]


def test_the_logistic_attack_wants_ten_rows_a_side() -> None:
    with pytest.raises(EngramError, match="10 rows a side or more, got 9"):
        logistic_attack([0.1] * 9, [0.2] * 50, seed=0)
    assert logistic_attack([0.1] * 10, [0.2] * 50, seed=0).n == 20
