"""Attacks that compare with shadow models, and classifiers of outputs: numbers in, numbers out, no model.

What an attack achieves is read against its value on retrained models, not against its extremes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import expit, log_ndtr
from torch import Tensor

from engram.errors import EngramError, unknown
from engram.stats import scores
from engram.stats.intervals import Estimate, Values, array, proportion

TINY = 1e-30  # added to a standard deviation
FEATURES = ("correctness", "confidence", "entropy", "modified entropy", "probabilities")
Outputs = tuple[Tensor, Tensor]  # logits [n, C] and labels [n]


def lira(phi: Values, inside: Values | None, outside: Values, *, pooled: bool = False) -> np.ndarray:
    """The likelihood-ratio attack (Carlini et al. 2022): a score [n] that is higher for members, in nats.

    phi [n]: confidences (logit-scaled) under the attacked model; `inside` and `outside` [N, n]: under shadow models
    that were trained with a row and without it, NaN where a model is of the other kind. Λ = ln N(phi; inside) -
    ln N(phi; outside), both normal about the median with the standard deviation of the row, or with one `pooled` over
    all rows (better with fewer than 64 shadow models). Without `inside` (offline): ln P(phi_out < phi). One more
    dimension [n, A], [N, n, A] holds augmentations, over which the score is averaged. IN 4, 5, 6 and OUT 0, 1, 2: phi
    4.2 gives 7.2, 3 gives 0, 2.5 gives -3. EngramError for shapes that do not fit and fewer than two models of a kind.
    """
    values = array(phi)
    centre, sd = _normal(outside, values, np.nanmedian, 0, pooled)
    if inside is None:
        score = log_ndtr((values - centre) / sd)
    else:
        score = _log_normal(values, *_normal(inside, values, np.nanmedian, 0, pooled)) - _log_normal(values, centre, sd)
    return score if values.ndim == 1 else score.mean(1)


def ulira_log_odds(phi: Values, unlearned: Values, retrained: Values, *, pooled: bool = False) -> np.ndarray:
    """ln p / (1 - p) of `ulira`, which does not saturate; positive: called unlearned."""
    values = array(phi)
    sides = [_normal(x, values, np.nanmean, 1, pooled) for x in (unlearned, retrained)]
    return _log_normal(values, *sides[0]) - _log_normal(values, *sides[1])


def ulira(phi: Values, unlearned: Values, retrained: Values, *, pooled: bool = False) -> np.ndarray:
    """Probability that a model has unlearned a row rather than never seen it (U-LiRA, Hayes et al. 2024).

    phi [..., n]: confidences under the attacked models; `unlearned` [N, n] and `retrained` [M, n]: under shadow models.
    p = N_u / (N_u + N_r), normal about the mean with the sample's standard deviation; .5 is the aim. Unlearned 3, 3.5,
    4 and retrained 1, 1.5, 2: phi 2.5 gives .5, 3.2 gives .996316.
    """
    return expit(ulira_log_odds(phi, unlearned, retrained, pooled=pooled))


def boosted_attack(
    retain: Values, test: Values, forget: Values, others: Values, *, seed: int, as_published: bool = False
) -> Estimate:
    """Accuracy of telling forget rows (1) from other test rows (0) by boosted trees: the ASR of LAF (Shen et al. 2024).

    Softmax vectors [n, C]; 100 trees (depth 6, rate .3) are fitted on retain (1) and test rows (0), each vector sorted
    ascending. `as_published` sorts for the fit alone, as the released code does: such figures are not those of a sound
    attack. EngramError where all vectors to learn from are the same.
    """
    from sklearn.ensemble import GradientBoostingClassifier

    known, asked = ([array(x) for x in pair] for pair in ((retain, test), (forget, others)))
    rows, kind = np.sort(np.concatenate(known), axis=1), np.repeat([1, 0], [len(x) for x in known])
    _refuse_constant(rows, "boosted")
    trees = GradientBoostingClassifier(n_estimators=100, learning_rate=0.3, max_depth=6, random_state=seed % 2**32)
    attacked = np.concatenate(asked)
    called = trees.fit(rows, kind).predict(attacked if as_published else np.sort(attacked, axis=1))
    right = called == np.repeat([1, 0], [len(x) for x in asked])
    return proportion(int(right.sum()), len(right))


def attack_features(logits: Tensor, labels: Tensor, *, as_published: bool = False) -> dict[str, Tensor]:
    """What `svc_attack` looks at, by name, each [n, k] float64, from logits [n, C] and labels [n]."""
    logits = logits.double()
    chances = logits.softmax(1)
    modified = _published_modified_entropy(chances, labels) if as_published else scores.modified_entropy(logits, labels)
    found = {
        "correctness": (logits.argmax(1) == labels).double(),
        "confidence": chances.gather(1, labels.unsqueeze(1)),
        "entropy": scores.entropy(logits),
        "modified entropy": modified,
        "probabilities": chances,
    }
    return {name: x.reshape(len(labels), -1) for name, x in found.items()}


def svc_attack(
    retain: Outputs, test: Outputs, forget: Outputs, *, feature: str = "confidence", as_published: bool = False
) -> Estimate:
    """Share of forget rows that are called non-members: the forget efficacy of Unlearn-Sparse (Jia et al. 2023), SalUn.

    A support vector classifier (rbf, C = 3, gamma 1 / k) learns one `feature` of retain (member) and test rows; each
    side is (logits [n, C], labels [n]). `as_published` follows the released modified entropy, which takes ln p for
    ln(1 - p) and lets the labels of all rows count for each. The aim is the share on retrained models, not 1.
    EngramError where the feature is the same for all rows to learn from.
    """
    from sklearn.svm import SVC

    if feature not in FEATURES:
        raise unknown("feature", feature, FEATURES)
    members, others, asked = (
        attack_features(*side, as_published=as_published)[feature].numpy() for side in (retain, test, forget)
    )
    rows = np.concatenate([members, others])
    _refuse_constant(rows, feature)
    machine = SVC(C=3, gamma="auto", random_state=0).fit(rows, np.repeat([1, 0], [len(members), len(others)]))
    return proportion(int((machine.predict(asked) == 0).sum()), len(asked))


def _normal(shadows: Values, phi: np.ndarray, centre: Any, ddof: int, pooled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Centre and standard deviation [n] (or [n, A]) over models."""
    x = array(shadows)
    if x.ndim < 2 or x.shape[1:] != phi.shape[-(x.ndim - 1) :]:
        raise EngramError(f"confidences {list(phi.shape)} want those of shadow models as [N, n], not {list(x.shape)}")
    if (np.isfinite(x).sum(0) < 2).any():
        raise EngramError("every row needs two shadow models or more of each kind; train more of them")
    variance = np.nanvar(x, axis=0, ddof=ddof)
    spread = np.sqrt(np.full_like(variance, variance.mean()) if pooled else variance)
    return centre(x, axis=0), spread + TINY


def _log_normal(x: np.ndarray, centre: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """ln of the density, but for a constant."""
    return -(((x - centre) / sd) ** 2) / 2 - np.log(sd)


def _published_modified_entropy(chances: Tensor, labels: Tensor) -> Tensor:
    named = torch.zeros(chances.shape[1], dtype=torch.bool)
    named[labels] = True  # the classes that any row is of
    return -(torch.where(named, 1 - chances, chances) * chances.clamp(min=TINY).log()).sum(1)


def _refuse_constant(rows: np.ndarray, what: str) -> None:
    if not len(rows) or (rows == rows[0]).all():
        raise EngramError(f"the {what} attack has nothing to learn from: its features are the same for all rows")
