"""What `works` means: all that must hold is proved, claims are measured, and the method's own term does the work."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engram import catalogue
from engram.audit import representation
from engram.core.learner import fork
from engram.core.request import Request
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.forget import npo
from engram.forget.blindspot import Blindspot
from engram.forget.laf import LAF
from engram.forget.ssd import SSD
from engram.keep.acu import ACU
from engram.keep.fetril import FeTrIL
from engram.keep.key_value import KeyValueBottleneck
from engram.keep.nmc import NMC
from engram.keep.rehearsal_free import RehearsalFree
from engram.reproduce import are_we_truly_forgetting, datamodel_matching, deep_regression_unlearning, laf
from engram.reproduce.digits import curve
from engram.stats import kmeans
from engram.stats.moments import ClassMeans
from engram.stats.ridge import Ridge

Split = tuple[Table, Table]
WORKS = [paper for paper in catalogue.papers() if paper.status.startswith("works")]


@pytest.mark.parametrize("paper", WORKS, ids=lambda paper: paper.slug)
def test_everything_that_must_hold_is_named_by_a_test(paper: catalogue.Paper) -> None:
    marks = re.compile(rf'@holds\("{paper.slug}", ([\d, ]+)\)')
    tests = (path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    proved = {int(k) for text in tests for found in marks.findall(text) for k in found.split(",")}
    assert proved == set(range(1, paper.holds + 1))
    assert paper.holds > 0
    assert set(paper.classes) <= {row.name for row in catalogue.methods()}


def rehearsal_free(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Final accuracy of five pairs with the distillation of predictions at this weight."""
    learner = RehearsalFree(network={"name": "MLP", "hidden": [64]}, epochs=8, prediction=weight)
    return curve(learner, class_stream(*split, base=2, increment=2))[-1]


def dampening(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy left on a forgotten class with the dampening factor's exponent at this weight."""
    model = Recipe({"name": "MLP", "hidden": [32]}, Optimizer(lr=3e-3), epochs=12)(split[0], 0)
    new = SSD(alpha=2.0, exponent=weight).forget(model, Request.of_classes(split[0], (3,)))
    return accuracy(new, split[1].of_classes([3]))


def translation(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest distance of the mean of an old class's features from its stored mean, with the shift so weighted."""
    stages = class_stream(*split, base=5, increment=5)
    learner = FeTrIL()
    learner.learn(stages[0].task, Run())
    sums: ClassMeans = learner.means.sums
    stored = dict(zip(sums.classes.tolist(), sums.mean, strict=True))
    learner.learn(stages[1].task, Run())
    monkeypatch.setattr(FeTrIL, "shifts", lambda self, means, own: weight * (means - own))
    features, labels = learner.pseudo_features(stages[1].task, Run())
    return max(float((features[labels == c].mean(0) - mean).norm()) for c, mean in stored.items())


def subtraction_of_means(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Relative error of class means after forgetting 50 rows, with the subtraction so weighted."""
    original = ClassMeans._move

    def weighted(self: ClassMeans, x: Tensor, y: Tensor, sign: int) -> None:
        original(self, x * (weight if sign < 0 else 1.0), y, sign)

    train = split[0]
    monkeypatch.setattr(ClassMeans, "_move", weighted)
    return _error(NMC(), train, lambda model: model.head.means)  # type: ignore[union-attr,return-value]


def subtraction_of_moments(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Relative error of ACU's head after forgetting 50 rows, with the subtraction so weighted."""
    original = Ridge.remove

    def weighted(self: Ridge, phi: Tensor, y: Tensor, **options: float) -> None:
        if weight == 1:
            original(self, phi, y, **options)
        elif weight == -1:
            self.add(phi, y)

    monkeypatch.setattr(Ridge, "remove", weighted)
    return _error(ACU(size=100), split[0], lambda model: model.head.weight.detach())  # type: ignore[union-attr,operator,return-value]


def _error(learner: NMC | ACU, train: Table, weights: Callable[[nn.Module], Tensor]) -> float:
    """Relative difference from a fresh fit on the rows that stay."""
    gone = train.take(range(50))
    other = fork(learner)
    learner.learn(Task(train), Run())
    learner.forget(Request.of_records(train, gone.ids))
    other.learn(Task(train.without(gone.ids), classes=train.classes), Run())
    one, fitted = (dict(zip(_born(x.model), weights(x.model), strict=True)) for x in (learner, other))
    return float(torch.stack([(one[c] - fitted[c]).norm() / fitted[c].norm() for c in fitted]).max())


def _born(model: nn.Module) -> list[int]:
    return model.head.classes.tolist()  # type: ignore[union-attr,operator,no-any-return]


def nearness_to_keys(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Final accuracy of five pairs with the distance by which a row selects its keys so weighted."""
    original = kmeans.relative_distances
    monkeypatch.setattr(kmeans, "relative_distances", lambda x, keys: weight * original(x, keys))
    plan = Optimizer("sgd", lr=16.0, momentum=0.0)
    learner = KeyValueBottleneck(codebooks=16, keys=64, classes_total=10, optimizer=plan, epochs=10)
    return curve(learner, class_stream(*split, base=2, increment=2))[-1]


def rejection(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy left on a forgotten class with the loss of the forget rows so weighted."""
    original = npo.rejection
    monkeypatch.setattr(npo, "rejection", lambda ratio, beta: weight * original(ratio, beta))
    model = Recipe({"name": "MLP", "hidden": [32]}, Optimizer(lr=3e-3), epochs=12)(split[0], 0)
    method = npo.NPO(beta=0.5, optimizer=Optimizer(lr=1e-3), epochs=8, retain_ratio=3)
    new = method.forget(model, Request.of_classes(split[0], (3,)))
    return accuracy(new, split[1].of_classes([3]))


def unlearning_of_the_density(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy left on a forgotten class with the extractor's unlearning loss so weighted."""
    original = LAF.unlearning
    monkeypatch.setattr(LAF, "unlearning", lambda self, *given: weight * original(self, *given))
    return laf.measure(laf.RECIPE(split[0], 0), 0, epochs=30)[1].forgotten


def nearness_of_representations(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """How much nearer to the original than retrained models a model is that forgot by its head alone, with CKA so
    weighted."""
    original = representation.cka
    monkeypatch.setattr(representation, "cka", lambda x, y: weight * original(x, y))
    return are_we_truly_forgetting.nearness_of_an_edited_head(0)


def imitation_of_the_guide(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """W1 of the predictions to retrained models, as a share of the original's, with the forget rows' term so
    weighted."""
    original = Blindspot.imitation
    monkeypatch.setattr(Blindspot, "imitation", lambda self, *given: weight * original(self, *given))
    problem = deep_regression_unlearning.toy(0)
    new = deep_regression_unlearning.blindspot().forget(problem.original, problem.request)
    return problem.figures(new).apart / problem.figures(problem.original).apart


def predicted_change(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Squared error of the logits that datamodels predict, as a share of doing nothing, with the change so weighted."""
    return datamodel_matching.prediction(0).error(weight)


OWN_TERMS: dict[str, tuple[Callable[[float, Split, pytest.MonkeyPatch], float], tuple[float, float]]] = {
    "nmc-baseline": (subtraction_of_means, (0.0, 1e-8)),
    "fetril": (translation, (0.0, 1e-5)),
    "acu": (subtraction_of_moments, (0.0, 1e-8)),
    "ssd": (dampening, (0.0, 0.25)),
    "laf": (unlearning_of_the_density, (0.0, 0.25)),
    "npo": (rejection, (0.0, 0.1)),
    "deep-regression-unlearning": (imitation_of_the_guide, (0.0, 0.4)),
    "datamodel-matching": (predicted_change, (0.0, 1 / 3)),
    "rehearsal-free": (rehearsal_free, (0.35, 0.6)),
    "discrete-key-value-bottleneck": (nearness_to_keys, (0.7, 1.0)),
    "are-we-truly-forgetting": (nearness_of_representations, (0.05, 1.0)),
}


def test_every_paper_that_works_has_its_own_term_tested() -> None:
    assert {paper.slug for paper in WORKS} == set(OWN_TERMS)


@pytest.mark.parametrize("weight", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("slug", OWN_TERMS)
def test_without_its_own_term_the_quantity_leaves_its_band(
    slug: str, weight: float, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, (low, high) = OWN_TERMS[slug]
    inside = low <= measure(weight, split, monkeypatch) <= high
    assert inside == (weight == 1.0)
