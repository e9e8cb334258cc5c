from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engram.data.streams import class_stream, single
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import accuracy
from engram.engine.run import Run
from engram.keep.finetune import Finetune
from engram.stats.continual import forgetting


def test_forgets_earlier_tasks_but_not_their_features(digits: Any, take: Callable[..., Any]) -> None:
    """The known control: five pairs of classes end at an accuracy of 0.2, though each pair could still be
    told apart."""
    course = take(Finetune(epochs=15), class_stream(digits.train, digits.test, base=2, increment=2))
    assert course.matrix[-1, -1] > 0.9 and course.matrix[-1, :-1].max() < 0.1
    assert forgetting(course.matrix) > 0.9
    assert course.task_aware.mean() > 0.9


def test_one_task_is_plain_training(digits: Any) -> None:
    learner = Finetune(epochs=15)
    learner.learn(single(digits.train, digits.test)[0].task)
    assert accuracy(learner.model, digits.test) > 0.94


def test_knows_which_classes_were_there_before(tiny: Table) -> None:
    learner, run = Finetune.tiny(), Run()
    seen = []
    for classes in [(0, 1), (1, 2), (3,)]:
        learner.learn(Task(tiny.of_classes(classes)), run)
        seen.append(learner.known)
    assert seen == [(), (0, 1), (0, 1, 2)]


def test_rows_that_went_into_the_weights_are_residue(tiny: Table) -> None:
    learner = Finetune.tiny()
    learner.learn(Task(tiny.take(range(30))))
    assert learner.holds(tiny.ids) == tiny.ids[:30]
    assert learner.drop(tiny.take([0, 59])) == (tiny.ids[0],)
