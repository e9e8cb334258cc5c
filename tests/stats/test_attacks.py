"""Attacks with shadow models and on outputs: the worked numbers, slow formulations, planted members and none."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.svm import SVC
from torch import Tensor

from engram.errors import EngramError
from engram.stats.attacks import FEATURES, attack_features, boosted_attack, lira, svc_attack, ulira, ulira_log_odds
from engram.stats.intervals import auc, tpr_at
from engram.stats.seeds import generator

INSIDE, OUTSIDE = np.array([[4.0], [5], [6]]), np.array([[0.0], [1], [2]])
UNLEARNED, RETRAINED = np.array([[3.0], [3.5], [4]]), np.array([[1.0], [1.5], [2]])


@pytest.mark.parametrize(("phi", "score"), [(4.2, 7.2), (3, 0), (2.5, -3)])
def test_the_worked_ratio(phi: float, score: float) -> None:
    assert lira([phi], INSIDE, OUTSIDE) == pytest.approx([score], abs=1e-9)


@pytest.mark.parametrize(("phi", "p"), [(2.5, 0.5), (3.2, 0.996316)])
def test_the_worked_probability(phi: float, p: float) -> None:
    assert ulira([phi], UNLEARNED, RETRAINED) == pytest.approx([p], abs=5e-7)
    assert ulira_log_odds([phi], UNLEARNED, RETRAINED) == pytest.approx([log(p / (1 - p))], abs=2e-4)


def test_worked_rates_of_examples() -> None:
    members, others = [0.9, 0.8, 0.7, 0.4], [0.85, 0.5, 0.3, 0.2, 0.1, 0.05]
    assert auc(members, others).value == pytest.approx(0.8333, abs=5e-5)
    assert tpr_at(members, others, 0).value == 0.25


def test_ratios_row_by_row_where_rows_have_models_of_their_own() -> None:
    draws = np.random.default_rng(0)
    phi, inside, outside = draws.normal(size=5), draws.normal(2, 1, (8, 5)), draws.normal(size=(8, 5))
    mask = draws.permuted(np.repeat([[True], [False]], 4, 0).repeat(5, 1), axis=0)
    score = lira(phi, np.where(mask, inside, np.nan), np.where(mask, np.nan, outside))
    alone = lira(phi, None, np.where(mask, np.nan, outside))
    for k in range(5):
        one, other = inside[mask[:, k], k], outside[~mask[:, k], k]
        high, low = (norm.logpdf(phi[k], np.median(x), x.std()) for x in (one, other))
        assert score[k] == pytest.approx(high - low)
        assert np.exp(alone[k]) == pytest.approx(norm.cdf(phi[k], np.median(other), other.std()))


def test_a_pooled_deviation_is_that_of_all_rows() -> None:
    draws = np.random.default_rng(1)
    phi, inside, outside = draws.normal(size=6), draws.normal(3, 1, (4, 6)), draws.normal(0, 2, (4, 6))
    sd = [np.sqrt(x.var(0).mean()) for x in (inside, outside)]
    middle = [np.median(x, 0) for x in (inside, outside)]
    wanted = norm.logpdf(phi, middle[0], sd[0]) - norm.logpdf(phi, middle[1], sd[1])
    assert lira(phi, inside, outside, pooled=True) == pytest.approx(wanted)
    means = [x.mean(0) for x in (inside, outside)]
    sd = [np.sqrt(x.var(0, ddof=1).mean()) for x in (inside, outside)]
    chances = [norm.pdf(phi, means[k], sd[k]) for k in range(2)]
    assert ulira(phi, inside, outside, pooled=True) == pytest.approx(chances[0] / (chances[0] + chances[1]))


def test_augmentations_are_averaged() -> None:
    draws = np.random.default_rng(2)
    phi, inside, outside = draws.normal(size=(5, 3)), draws.normal(2, 1, (6, 5, 3)), draws.normal(size=(7, 5, 3))
    single = [lira(phi[:, a], inside[:, :, a], outside[:, :, a]) for a in range(3)]
    assert lira(phi, inside, outside) == pytest.approx(np.mean(single, 0))


def test_the_offline_score_keeps_the_order_far_out() -> None:
    found = lira([3.0, 20, 25, 30], None, np.tile([[0.0], [1], [2]], 4))
    assert (np.diff(found) > 0).all() and (found < 0).all()


def test_many_models_at_once_are_judged_as_one_by_one() -> None:
    draws = np.random.default_rng(3)
    phi, one, other = draws.normal(size=(4, 5)), draws.normal(size=(6, 5)), draws.normal(1, 1, (6, 5))
    assert ulira(phi, one, other) == pytest.approx(np.stack([ulira(x, one, other) for x in phi]))


@given(st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_scores_do_not_depend_on_the_scale(factor: float, shift: float) -> None:
    draws = np.random.default_rng(4)
    given_ = draws.normal(size=5), draws.normal(2, 1, (6, 5)), draws.normal(size=(6, 5))
    moved = [factor * x + shift for x in given_]
    assert lira(*moved) == pytest.approx(lira(*given_), rel=1e-6, abs=1e-6)
    assert ulira(*moved) == pytest.approx(ulira(*given_), rel=1e-6, abs=1e-9)


def test_equal_populations_cannot_be_told() -> None:
    x = np.random.default_rng(5).normal(size=(9, 4))
    assert lira(x[0], x, x).tolist() == [0] * 4 and ulira(x[0], x, x).tolist() == [0.5] * 4
    assert np.isfinite(ulira_log_odds([1.0, 2.0], np.ones((3, 2)), np.ones((3, 2)))).all()  # no spread at all


@pytest.mark.parametrize("attack", [lira, ulira])
def test_too_few_models_and_other_shapes_are_refused(attack: object) -> None:
    with pytest.raises(EngramError, match="two shadow models"):
        attack([1.0], [[2.0]], [[1.0], [2.0]])  # type: ignore[operator]
    with pytest.raises(EngramError, match=r"\[N, n\]"):
        attack([1.0, 2.0], [[2.0], [1.0]], [[1.0], [2.0]])  # type: ignore[operator]


def sides(sharp: float, dull: float, n: int = 120) -> list[np.ndarray]:
    """Softmax vectors [n, 5]: of retain and forget rows (sharp), of test rows and others (dull); any class wins."""
    draws = np.random.default_rng(6)
    found = []
    for scale in (sharp, dull, sharp, dull):
        logits = scale * draws.normal(size=(n, 5))
        found.append(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    return found


def test_boosted_trees_tell_members_by_the_shape_of_the_vector() -> None:
    retain, test, forget, others = sides(6.0, 0.5)
    found = boosted_attack(retain, test, forget, others, seed=0)
    assert found.low > 0.85 and found.n == 240
    one_class = [np.roll(np.sort(x), k, axis=1) for k, x in enumerate((retain, test, forget, others))]
    assert boosted_attack(*one_class, seed=0) == found  # the order of the classes does not matter
    published = boosted_attack(*one_class, seed=0, as_published=True)
    assert published.value < found.value  # the trees see vectors of a kind that they did not learn


def test_boosted_trees_tell_nothing_where_there_is_nothing() -> None:
    found = boosted_attack(*sides(1.0, 1.0), seed=0)
    assert found.low < 0.5 < found.high
    with pytest.raises(EngramError, match="same for all rows"):
        boosted_attack(*[np.full((4, 2), 0.5)] * 4, seed=0)


def test_the_worked_features() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    found = attack_features(logits, torch.tensor([0]))
    assert tuple(found) == FEATURES and all(len(x) == 1 for x in found.values())
    assert found["modified entropy"].item() == pytest.approx(0.162167, abs=5e-7)
    published = attack_features(logits, torch.tensor([0]), as_published=True)
    assert published["modified entropy"].item() == pytest.approx(0.659149, abs=5e-7)
    assert found["confidence"].item() == pytest.approx(0.7) and found["correctness"].item() == 1
    assert found["entropy"].item() == pytest.approx(-(0.7 * log(0.7) + 0.2 * log(0.2) + 0.1 * log(0.1)), abs=1e-7)


def test_the_published_feature_depends_on_the_other_rows() -> None:
    logits, labels = torch.randn(6, 3, generator=generator("features"), dtype=torch.float64), torch.arange(6) % 3
    together = attack_features(logits, labels, as_published=True)["modified entropy"]
    alone = attack_features(logits[:1], labels[:1], as_published=True)["modified entropy"]
    assert together[0].item() != pytest.approx(alone.item(), abs=1e-3)
    sound = [attack_features(logits[k : k + 1], labels[k : k + 1])["modified entropy"] for k in range(6)]
    assert attack_features(logits, labels)["modified entropy"].numpy() == pytest.approx(torch.cat(sound).numpy())


def outputs(strength: float, name: str, n: int = 150) -> tuple[Tensor, Tensor]:
    """Logits that favour the label by a strength, and labels."""
    labels = torch.arange(n) % 3
    noise = torch.randn(n, 3, generator=generator("outputs", name), dtype=torch.float64)
    return noise + strength * torch.nn.functional.one_hot(labels, 3), labels


@pytest.mark.parametrize("feature", FEATURES)
def test_forget_rows_that_look_like_test_rows_are_called_non_members(feature: str) -> None:
    retain, test = outputs(6, "retain"), outputs(0.5, "test")
    gone, kept = (svc_attack(retain, test, outputs(strength, "forget"), feature=feature) for strength in (0.5, 6.0))
    assert kept.value < 0.1 and gone.value > 0.4 and gone.n == 150


def test_the_classifier_is_that_of_scikit_learn() -> None:
    retain, test, forget = outputs(3, "a"), outputs(1, "b"), outputs(2, "c", 40)
    rows = np.concatenate([attack_features(*side)["probabilities"] for side in (retain, test)])
    machine = SVC(C=3, gamma=1 / 3, random_state=0).fit(rows, [1] * 150 + [0] * 150)
    wanted = 1 - machine.predict(attack_features(*forget)["probabilities"]).mean()
    assert svc_attack(retain, test, forget, feature="probabilities").value == pytest.approx(wanted)


def test_constant_and_unknown_features_are_refused() -> None:
    sure = outputs(100, "a")
    with pytest.raises(EngramError, match="features are the same for all rows"):
        svc_attack(sure, sure, sure, feature="correctness")
    with pytest.raises(EngramError, match="did you mean 'entropy'"):
        svc_attack(sure, sure, sure, feature="entropi")
