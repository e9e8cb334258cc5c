from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engram.core.erasure import forget
from engram.core.history import History
from engram.core.learner import Learner, fork
from engram.core.request import Request
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import accuracy, predict
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.finetune import Finetune
from engram.keep.joint import Joint, JointHead
from engram.models import digest

BOTH: list[Callable[..., Learner]] = [Joint.tiny, JointHead.tiny]


def tasks(table: Table) -> tuple[Task, ...]:
    return tuple(Task(table.of_classes((2 * i, 2 * i + 1)), index=i) for i in range(5))


def learnt(make: Callable[..., Learner], table: Table) -> Any:
    learner = make()
    for task in tasks(table):
        learner.learn(task)
    return learner


def test_joint_is_the_recipe_on_all_rows(tiny: Table) -> None:
    learner = learnt(Joint.tiny, tiny)
    rows = [task.train for task in tasks(tiny)]
    recipe = Recipe(learner.network, learner.optimizer, learner.epochs, learner.batch_size)
    assert digest(learner.model) == digest(recipe(rows[0].concat(*rows[1:]), 0))


@pytest.mark.parametrize("make", BOTH)
def test_forgetting_is_the_history_without_the_rows(tiny: Table, make: Callable[..., Learner]) -> None:
    gone = (*tiny.of_classes([4]).ids, *tiny.of_classes([8, 9]).ids, *tiny.ids[:3])
    learner = learnt(make, tiny)
    done = forget(learner, Request.of_records(tiny, gone))
    assert done.exact and done.residue == () == learner.holds(gone)
    left = tiny.without(gone)
    oracle = History(make(), tasks(tiny)).learn(left, 0, Run(seed=7))
    left_classes = [0, 1, 2, 3, 5, 6, 7]
    found, wanted = (predict(each.model, tiny)[:, left_classes] for each in (learner, oracle))
    assert torch.allclose(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", BOTH)
def test_with_no_row_left_no_class_is_live(tiny: Table, make: Callable[..., Learner]) -> None:
    learner = learnt(make, tiny)
    forget(learner, Request.of_records(tiny, tiny.ids))
    assert not learner.model.head.live.any()
    again = make()
    for each in (learner, again):
        each.learn(Task(tiny))
    assert torch.equal(predict(learner.model, tiny), predict(again.model, tiny))


@pytest.mark.parametrize("make", BOTH)
def test_rows_come_and_go_once(tiny: Table, make: Callable[..., Learner]) -> None:
    learner = learnt(make, tiny.take(range(30)))
    before = predict(learner.model, tiny)
    learner.learn(Task(tiny.take(range(10, 20))))
    assert torch.equal(predict(learner.model, tiny), before)
    with pytest.raises(EngramError, match="never learnt"):
        forget(learner, Request.of_records(tiny, (tiny.ids[0], tiny.ids[59])))
    assert learner.holds(tiny.ids) == tiny.ids[:30]


@pytest.mark.parametrize("make", BOTH)
def test_a_copy_goes_on_learning_the_same(tiny: Table, make: Callable[..., Learner]) -> None:
    learner = learnt(make, tiny.take(range(30)))
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(Task(tiny.take(range(30, 60))))
    assert torch.equal(predict(learner.model, tiny), predict(twin.model, tiny))


def test_bounds_from_above_what_finetuning_bounds_from_below(digits: Any, take: Callable[..., Any]) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=4)
    joint, head, tuned = (take(learner, stages).curve[-1] for learner in (Joint(epochs=10), JointHead(), Finetune()))
    assert joint > 0.93 and head > 0.93
    assert tuned < 0.5


@pytest.mark.parametrize("classifier", ["logistic", "svc", "ridge"])
def test_every_classifier_of_the_joint_head_is_useful(digits: Any, classifier: str) -> None:
    learner = JointHead(classifier=classifier)
    learner.learn(Task(digits.train))
    assert accuracy(learner.model, digits.test) > 0.93
