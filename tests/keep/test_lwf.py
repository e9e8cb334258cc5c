from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.keep.halves import NEW, OLD, SMALL, begun, halves, learnt, same
from torch import nn

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.request import Request
from engram.core.unlearning import GradientForgetter
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.keep.finetune import Finetune
from engram.keep.lwf import LwF
from engram.keep.rehearsal_free import RehearsalFree
from engram.models import seeded


def test_weight_zero_is_fine_tuning(tiny: Table) -> None:
    tuned = learnt(Finetune(**SMALL), tiny)
    assert same(learnt(LwF(**SMALL, weight=0.0), tiny), tuned)
    assert not same(learnt(LwF(**SMALL), tiny), tuned)


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 2.0), (0.3, 5.0)])
def test_the_loss_written_down(tiny: Table, weight: float, temperature: float) -> None:
    learner = begun(LwF(**SMALL, weight=weight, temperature=temperature), tiny)
    batch = tiny.of_classes(NEW).batch(torch.arange(30))
    with torch.no_grad():
        before = learner.model.eval()(**batch.inputs).logits.double()
        with seeded(torch.Generator().manual_seed(0)):
            for p in learner.model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    output = learner.model(**batch.inputs)
    z, total = output.logits.detach().double(), 0.0
    for row, label in enumerate(batch.labels.tolist()):  # type: ignore[union-attr]
        total -= float(z[row].log_softmax(0)[label])
        recorded = before[row, :5].softmax(0) ** (1 / temperature)  # as in the paper: powers of probabilities, scaled
        said = z[row, :5].softmax(0) ** (1 / temperature)
        recorded, said = recorded / recorded.sum(), said / said.sum()
        total -= weight * float((recorded * said.log()).sum())
    assert learner.terms(batch, output).value.item() == pytest.approx(total / len(batch), rel=1e-5)


def test_the_distillation_has_no_gradient_at_the_teacher(tiny: Table) -> None:
    learner = begun(LwF(**SMALL, weight=1.0), tiny)
    batch = tiny.of_classes(NEW).batch(torch.arange(30))
    grads = []
    for teacher in (learner.teacher, None):
        learner.teacher = teacher
        learner.model.zero_grad()
        learner.terms(batch, learner.model.eval()(**batch.inputs)).value.backward()
        grads.append(learner.model.head.bias.grad.clone())
    assert torch.allclose(grads[0], grads[1], atol=1e-6) and grads[1].abs().max() > 0.05


def test_it_is_rehearsal_free_learning_with_a_softmax(tiny: Table) -> None:
    other = RehearsalFree(**SMALL, head="softmax", prediction=0.7, temperature=3.0)
    assert same(learnt(LwF(**SMALL, weight=0.7, temperature=3.0), tiny), learnt(other, tiny))


def test_classes_that_come_again_are_trained_by_their_labels_alone(tiny: Table) -> None:
    learner, run = LwF(**SMALL), Run()
    learner.learn(halves(tiny)[0], run)
    again = Task(tiny.of_classes((3, 4, 5)), index=1, classes=(5,))
    learner._prepare(again, run)
    learner.start(again, run)
    assert learner.known == OLD and learner.old == [0, 1, 2]


def test_what_was_forgotten_is_not_taught_back(tiny: Table) -> None:
    learner, run = LwF(**SMALL), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    done = forget(learner, Request.of_classes(first.train, (2,)), Wiped())
    assert set(done.residue) == set(first.train.of_classes((2,)).ids)
    learner._prepare(second, run)
    learner.start(second, run)
    assert learner.teacher is not None and (learner.teacher.values[:, 2] == 0).all()


class Wiped(GradientForgetter):
    """Sets what the head knows of class 2 to zero."""

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        import copy

        new = copy.deepcopy(model)
        for p in new.head.parameters():  # type: ignore[union-attr]
            p.data[2] = 0
        return new


def test_old_classes_are_told_apart_better_than_after_fine_tuning(digits: Any, take: Callable[..., Any]) -> None:
    stages = class_stream(digits.train, digits.test, base=5, increment=5)
    kept, lost = (
        sum(take(kind(epochs=30), stages, Run(seed=seed)).task_aware[0] for seed in range(2)) / 2
        for kind in (LwF, Finetune)
    )
    assert kept > lost + 0.03


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = LwF.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin)
