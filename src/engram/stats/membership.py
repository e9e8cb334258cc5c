"""Membership attacks on scores that were already computed: vectors in, numbers out, no model.

An attack is read against its value on retrained models, not against its extremes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from engram.errors import EngramError
from engram.stats.intervals import Estimate, Values, array, auc, proportion


@dataclass(frozen=True)
class Roc:
    """False and true positive rates as the threshold falls; positive is score >= threshold. Each [points]."""

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray


@dataclass(frozen=True)
class Attack:
    """Balanced accuracy of "member iff loss <= threshold" (.5 is chance), and the AUC of -loss."""

    accuracy: float
    threshold: float
    auc: Estimate


def roc(members: Values, others: Values) -> Roc:
    """ROC curve for scores that are higher for members; begins with (0, 0) at +inf. O(n log n)."""
    p, q = np.sort(array(members).ravel()), np.sort(array(others).ravel())
    cuts = np.concatenate([[np.inf], np.unique(np.concatenate([p, q]))[::-1]])
    fpr, tpr = (1 - np.searchsorted(x, cuts, side="left") / len(x) for x in (q, p))
    return Roc(fpr, tpr, cuts)


def threshold_attack(members: Values, others: Values) -> Attack:
    """The best threshold on the loss, the smallest of several; chosen on the same rows, so never below .5."""
    m, o = _losses(members, others)
    curve = roc(-m, -o)
    hits, alarms = np.rint(curve.tpr * len(m)), np.rint(curve.fpr * len(o))
    best = int(np.argmax(hits * len(o) - alarms * len(m)))  # whole numbers, so that equal is equal
    accuracy = float(1 + curve.tpr[best] - curve.fpr[best]) / 2
    return Attack(accuracy, float(-curve.thresholds[best]), auc(-m, -o))


def yeom_attack(members: Values, others: Values) -> Attack:
    """Threshold at the mean loss of the members (Yeom et al. 2018)."""
    m, o = _losses(members, others)
    accuracy = float((m <= m.mean()).mean() + (o > m.mean()).mean()) / 2
    return Attack(accuracy, float(m.mean()), auc(-m, -o))


def logistic_attack(
    forget: Values, test: Values, *, seed: int, splits: int = 10, clip: float = 100, level: float = 0.95
) -> Estimate:
    """Accuracy of telling forget rows (1) from test rows (0) by logistic regression on the loss; .5 is ideal.

    Balanced subsample, losses clipped to ±clip, mean over stratified shuffle splits of 90 to 10 (the
    challenge kit's 10 splits; SCRUB has 5). The interval is that of a share of the rows used, once each: the
    splits overlap and add no rows. Raises EngramError below 10 rows a side.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    sides = _losses(forget, test)
    size, generator = min(map(len, sides)), np.random.default_rng(seed)
    if size < 10:
        raise EngramError(f"the logistic attack wants 10 rows a side or more, got {size}")
    rows = np.concatenate([x[generator.permutation(len(x))[:size]] for x in sides]).clip(-clip, clip)
    member = np.repeat([1, 0], size)
    folds = StratifiedShuffleSplit(splits, test_size=0.1, random_state=seed % 2**32)
    accuracy = float(cross_val_score(LogisticRegression(), rows[:, None], member, cv=folds).mean())
    around = proportion(round(accuracy * 2 * size), 2 * size, level)
    return Estimate(accuracy, around.low, around.high, 2 * size)


def entropy_attack(
    retain: Values,
    test: Values,
    forget: Values,
    *,
    classifier: Literal["logistic", "svc"] = "logistic",
    level: float = 0.95,
) -> Estimate:
    """Share of forget rows called members by a classifier of entropies, trained on retain (1) and test (0).

    "logistic" as in SSD (Foster et al. 2024), "svc" (rbf, C = 3) as in bad teaching (Chundawat et al. 2023),
    both with balanced class weights. The aim is the value of retrained models, not 0.
    """
    r, t, f = (array(x).reshape(-1, 1) for x in (retain, test, forget))
    model = _classifier(classifier).fit(np.concatenate([r, t]), np.repeat([1, 0], [len(r), len(t)]))
    return proportion(int(model.predict(f).sum()), len(f), level)


def _classifier(kind: str) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    logistic = LogisticRegression(class_weight="balanced")
    return {"logistic": logistic, "svc": SVC(C=3, gamma="auto", class_weight="balanced", random_state=0)}[kind]


def _losses(members: Values, others: Values) -> tuple[np.ndarray, np.ndarray]:
    m, o = array(members).ravel(), array(others).ravel()
    if not (len(m) and len(o)) or np.isnan(m).any() or np.isnan(o).any():
        raise EngramError("a membership attack needs losses on both sides, none of them NaN")
    return m, o
