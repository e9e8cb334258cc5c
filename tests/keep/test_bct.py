"""Backward-compatible training: its loss, its frozen classifier, networks of a chain, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.keep.halves import NEW, OLD, begun, halves, learnt, same

from engram.core.learner import fork
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import features
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.bct import BCT, SMALL, class_centres, unit
from engram.keep.bt2 import BT2
from engram.models.io import load, save
from engram.testing import holds

SETTINGS = {"network": SMALL, "dim": 8, "epochs": 3, "batch_size": 32, "optimizer": Optimizer(lr=1e-2)}


@pytest.mark.parametrize("extra", [0, 3])
def test_the_loss_written_down(tiny: Table, extra: int) -> None:
    learner = begun(BCT(**SETTINGS, extra=extra, pseudo=10.0), tiny)
    batch = tiny.of_classes(NEW).batch(torch.arange(7))
    centres = learner.classifier.weight.double()
    output = learner.model(**batch.inputs)
    z, total, rows = output.pooler_output.detach().double(), 0.0, learner.model.head.weight.detach().double()
    for row, label in enumerate(batch.labels.tolist()):  # type: ignore[union-attr]
        own = [float(z[row] @ w) for w in rows]
        old = [float(z[row, :8] @ m) for m in centres]
        for scores, weight in ((own, 1.0), (old, 10.0)):
            total -= weight * float(torch.tensor(scores).log_softmax(0)[NEW.index(label)])
    assert learner.terms(batch, output).value.item() == pytest.approx(total / 7, rel=1e-5)
    assert torch.allclose(z.norm(dim=1), torch.ones(7).double(), atol=1e-6)


def test_the_classifier_of_the_old_space_is_the_mean_of_its_vectors_by_class(tiny: Table) -> None:
    learner = begun(BCT(**SETTINGS), tiny)
    rows = tiny.of_classes(NEW)
    old = learner._old()  # the untrained model of the upgrade: any will do
    vectors = F.normalize(features(old, rows), dim=1)
    head = class_centres(vectors, Task(rows))
    for c in NEW:
        of = [vectors[i].double() for i, label in enumerate(rows.labels.tolist()) if label == c]  # type: ignore[union-attr]
        assert torch.allclose(head.weight[NEW.index(c)].double(), sum(of) / len(of), atol=1e-7)  # type: ignore[arg-type]
    assert head.weight.norm(dim=1).max() < 1  # a mean of unit vectors, left as it is
    some = rows.labels.clone()  # type: ignore[union-attr]
    some[0] = -1
    fewer = class_centres(vectors, Task(rows.with_labels(some)))
    assert torch.allclose(fewer.weight, class_centres(vectors[1:], Task(rows.take(range(1, len(rows))))).weight)


@holds("bt2", 5)
def test_the_classifier_takes_no_gradient_and_leaves_the_extra_numbers_free(tiny: Table) -> None:
    """M padded with zeros: the loss of the old space has no gradient in the last k numbers."""
    learner = begun(BCT(**SETTINGS, extra=3), tiny)
    batch = tiny.of_classes(NEW).batch(torch.arange(20))
    assert learner.model.encoder.width == 11 and learner.classifier.width == 8
    output = learner.model(**batch.inputs)
    output.pooler_output.retain_grad()
    learner.compatible(batch, output).value.backward()
    grad = output.pooler_output.grad
    assert (grad[:, 8:] == 0).all() and grad[:, :8].abs().max() > 0
    padded = F.pad(learner.classifier.weight, (0, 3))
    assert torch.allclose(output.pooler_output @ padded.T, output.pooler_output[:, :8] @ learner.classifier.weight.T)
    assert not learner.classifier.weight.requires_grad and learner.classifier.weight.grad is None
    assert not learner.recorded.values.requires_grad


def test_without_the_weight_it_is_an_independent_model(tiny: Table) -> None:
    second = halves(tiny)[1]
    alone = BCT(**SETTINGS)
    alone.learn(second)
    upgraded, bound = (BCT(**SETTINGS, old=alone.model, pseudo=pseudo) for pseudo in (0.0, 10.0))
    upgraded.learn(second)
    bound.learn(second)
    assert same(upgraded, alone) and not same(bound, alone)


def test_an_old_model_may_be_of_any_kind_and_may_stand_in_a_directory(tiny: Table, tmp_path: Path) -> None:
    first, second = halves(tiny)
    old = Recipe({"name": "MLP", "hidden": [12]}, epochs=1)(first.train, 0)
    save(old, tmp_path / "old")
    learners = [BCT(**SETTINGS, old=given, extra=2) for given in (old, str(tmp_path / "old"))]
    for learner in learners:
        learner.learn(second)
    assert same(*learners) and learners[0].model.encoder.width == 14
    with pytest.raises(EngramError, match="holds no saved model"):
        BCT(**SETTINGS, old=str(tmp_path / "nothing")).learn(second)


def test_each_task_has_its_network_and_the_last_goes_on(tiny: Table) -> None:
    learner = BCT(
        **{**SETTINGS, "epochs": 1},
        extra=1,
        upgrades=({"name": "ConvNet", "widths": [4]}, {"name": "MLP", "hidden": [5]}),
    )
    found = []
    for _ in range(4):
        learner.learn(Task(tiny))
        found.append((type(learner.model.encoder.inner).__name__, learner.model.encoder.width))
    assert found == [("MLP", 8), ("ConvNet", 9), ("MLP", 10), ("MLP", 11)]


def test_the_head_knows_the_classes_of_the_tasks_rows(tiny: Table) -> None:
    learner = BCT(**SETTINGS)
    first, second = halves(tiny)
    learner.learn(first)
    assert tuple(learner.model.head.classes.tolist()) == OLD
    learner.learn(second)
    assert tuple(learner.model.head.classes.tolist()) == NEW
    assert set(learner.holds(first.train.ids)) == set(first.train.ids)  # its vectors have shaped those of the upgrade


@pytest.mark.parametrize("kind", [BCT, BT2])
def test_a_copy_goes_on_learning_the_same(tiny: Table, kind: type[BCT]) -> None:
    learner = kind(**SETTINGS, extra=2, upgrades=({"name": "ConvNet", "widths": [4]},))
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin)
    assert type(twin.model.encoder.inner).__name__ == "ConvNet"


@pytest.mark.parametrize("kind", [BCT, BT2])
def test_the_model_is_saved_and_loads_by_itself(tiny: Table, kind: type[BCT], tmp_path: Path) -> None:
    learner = learnt(kind(**SETTINGS, extra=2), tiny)
    save(learner.model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(features(again, tiny), features(learner.model, tiny))


@pytest.mark.parametrize("kind", [BCT, BT2])
def test_numbers_are_refused_before_anything_is_lost(tiny: Table, kind: type[BCT]) -> None:
    learner = kind(**SETTINGS, extra=2)
    learner.learn(halves(tiny)[0], Run())
    model = learner.model
    with pytest.raises(EngramError, match="learnt from classes"):
        learner.learn(Task(tiny.with_labels(torch.zeros(len(tiny), 1))))
    assert learner.model is model
    assert torch.equal(unit(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))
