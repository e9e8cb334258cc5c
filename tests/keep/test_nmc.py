from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.request import Request
from engram.data.streams import class_stream, online, single
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import accuracy, predict
from engram.errors import EngramError
from engram.keep.finetune import Finetune
from engram.keep.nmc import NMC
from engram.models import MLP, LinearHead, Predictor, seeded
from engram.stats.continual import forgetting
from engram.testing import holds

Take = Callable[..., Any]


def learnt(table: Table, **settings: Any) -> NMC:
    learner = NMC(**settings)
    learner.learn(Task(table))
    return learner


def unit(table: Table) -> Tensor:
    return F.normalize(table.inputs["pixel_values"].flatten(1).double(), dim=1)


def means(learner: NMC) -> Tensor:
    found: Tensor = learner.means.sums.mean
    return found


@holds("nmc-baseline", 1)
def test_the_order_of_rows_and_of_tasks_is_of_no_matter(digits: Any) -> None:
    joint = learnt(digits.train)
    u, y = unit(digits.train), digits.train.labels
    by_hand = torch.stack([u[y == c].mean(0) for c in range(10)])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    streams = {
        "tasks": [stage.task for stage in class_stream(digits.train, digits.test, base=2, increment=2)],
        "other tasks": [
            stage.task for stage in class_stream(digits.train, digits.test, base=4, increment=3, order="pycil", seed=1)
        ],
        "shuffled": list(online(single(digits.train, digits.test), 100, seed=3)),
        "the same classes twice": [
            Task(digits.train.take(order[:600])),
            Task(digits.train.take(order[600:])),
        ],
    }
    assert torch.allclose(means(joint), by_hand, atol=1e-10, rtol=0)
    for name, tasks in streams.items():
        learner = NMC()
        for task in tasks:
            learner.learn(task)
        assert torch.allclose(means(learner), by_hand, atol=1e-10, rtol=0), name
        same = predict(learner.model, digits.test).argmax(1) == predict(joint.model, digits.test).argmax(1)
        assert same.all(), name


@holds("nmc-baseline", 1)
@given(st.permutations(range(60)))
def test_one_by_one_in_any_order_gives_the_means_of_the_batch(tiny: Table, order: list[int]) -> None:
    learner = NMC()
    for row in order:
        learner.learn(Task(tiny.take([row])))
    assert torch.allclose(means(learner), means(learnt(tiny)), atol=1e-10, rtol=0)


@holds("nmc-baseline", 2)
def test_the_linear_form_is_the_nearest_mean(digits: Any) -> None:
    learner = learnt(digits.train)
    distances = (unit(digits.test)[:, None] - means(learner)).norm(dim=2)
    assert torch.equal(predict(learner.model, digits.test).argmax(1), distances.argmin(1))


@holds("nmc-baseline", 3)
def test_later_classes_change_nothing_of_earlier_ones(digits: Any) -> None:
    old = tuple(range(5))
    learner, test = learnt(digits.train.of_classes(old)), digits.test.of_classes(old)
    sums, head = learner.means.sums.sums.clone(), learner.model.head.means.clone()  # type: ignore[union-attr]
    logits, before = predict(learner.model, test), accuracy(learner.model, test)
    learner.learn(Task(digits.train.of_classes(range(5, 10))))
    assert torch.equal(learner.means.sums.sums[:5], sums)
    assert torch.equal(learner.model.head.means[:5], head)  # type: ignore[union-attr, index]
    assert torch.allclose(predict(learner.model, test)[:, :5], logits, atol=1e-14)
    assert accuracy(learner.model, test, classes=old) == before > accuracy(learner.model, test)


@holds("nmc-baseline", 4)
def test_published_protocol_on_digits(digits: Any, take: Take) -> None:
    course = take(NMC(), class_stream(digits.train, digits.test, base=2, increment=2, tasks=5))
    assert np.round(course.curve, 4).tolist() == [1.0, 0.9493, 0.9479, 0.9470, 0.9019]
    assert np.mean(course.curve) == pytest.approx(0.9492, abs=5e-5)
    assert forgetting(course.matrix) == pytest.approx(0.0506, abs=5e-5)
    plain = learnt(digits.train, normalise=False)
    assert accuracy(plain.model, digits.test) == pytest.approx(0.9037, abs=5e-5)


@holds("nmc-baseline", 5)
def test_wins_by_far_over_finetuning(digits: Any, take: Take) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    tuned = take(Finetune(epochs=40), stages).curve[-1]
    assert tuned < 0.25
    assert take(NMC(), stages).curve[-1] > tuned + 0.5


@holds("nmc-baseline", 6)
def test_unequal_parts_of_a_class_count_by_their_rows(digits: Any) -> None:
    rows = digits.train.of_classes([3]).take(range(100))
    learner = NMC()
    learner.learn(Task(rows.take(range(10))))
    learner.learn(Task(rows.take(range(10, 100))))
    assert torch.allclose(means(learner)[0], unit(rows).mean(0), atol=1e-12)


def test_forgetting_is_never_having_learnt(tiny: Table) -> None:
    gone = (*tiny.ids[:3], *tiny.of_classes([7]).ids)
    learner = learnt(tiny)
    done = forget(learner, Request.of_records(tiny, gone))
    oracle = learnt(tiny.without(gone))
    assert done.exact and done.residue == ()
    assert torch.allclose(means(learner), means(oracle), atol=1e-14)
    assert torch.allclose(predict(learner.model, tiny), predict(oracle.model, tiny), atol=1e-14)
    assert learner.holds(tiny.ids) == tiny.without(gone).ids


def test_a_forgotten_class_can_be_learnt_again(tiny: Table) -> None:
    learner = learnt(tiny)
    sevens = tiny.of_classes([7])
    forget(learner, Request.of_classes(tiny, (7,)))
    assert torch.isneginf(predict(learner.model, sevens)[:, 7]).all()
    learner.learn(Task(sevens))
    assert torch.allclose(means(learner), means(learnt(tiny)), atol=1e-14)


def test_refuses_what_it_never_learnt_and_what_it_knows_already(tiny: Table) -> None:
    learner = learnt(tiny.take(range(50)))
    before = means(learner).clone()
    with pytest.raises(EngramError, match=repr(tiny.ids[59])):
        learner.forget(Request.of_records(tiny, (tiny.ids[0], tiny.ids[59])))
    with pytest.raises(EngramError, match=repr(tiny.ids[0])):
        learner.learn(Task(tiny.take([0])))
    with pytest.raises(EngramError, match="has no label"):
        learner.learn(Task(tiny.take([59]).with_labels(torch.tensor([-1]))))
    assert torch.equal(means(learner), before)
    assert learner.drop(tiny.take([59])) == ()


def test_forget_rows_need_no_labels(tiny: Table) -> None:
    learner = learnt(tiny)
    request = Request.of_records(tiny, tiny.ids[:5])
    assert request.forget is not None
    assert learner.forget(request.but(forget=request.forget.unlabelled())) == ()
    assert torch.allclose(means(learner), means(learnt(tiny.take(range(5, 60)))), atol=1e-14)


def test_a_backbone_in_train_mode_is_used_in_eval_mode(tiny: Table) -> None:
    with seeded(torch.Generator().manual_seed(0)):
        backbone = Predictor(MLP(64, [32], dropout=0.5, norm="batch"), LinearHead(32, range(10))).train()
    learner = learnt(tiny, backbone=backbone)
    assert backbone.training and not learner.model.encoder.training  # type: ignore[union-attr]
    halves = NMC(backbone=backbone)
    for part in (tiny.take(range(30)), tiny.take(range(30, 60))):
        halves.learn(Task(part))
    assert torch.allclose(means(halves), means(learner), atol=1e-6)


def test_a_copy_goes_on_learning(tiny: Table) -> None:
    learner = learnt(tiny.take(range(30)))
    twin = fork(learner)
    assert isinstance(twin, NMC) and isinstance(twin.model, nn.Module)
    twin.learn(Task(tiny.take(range(30, 60))))
    assert torch.allclose(means(twin), means(learnt(tiny)), atol=1e-14)
    assert len(means(learner)) == 5
