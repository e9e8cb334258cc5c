from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engram.core.learner import fork
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.keep.finetune import Finetune
from engram.keep.replay import Replay


def test_a_buffer_keeps_what_finetuning_loses(digits: Any, take: Callable[..., Any]) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    small, large, none = (
        take(learner, stages).curve[-1]
        for learner in (Replay(buffer=20, rule="per_class"), Replay(buffer=200, rule="per_class"), Finetune())
    )
    assert large > small + 0.03
    assert small > none + 0.2
    assert large > 0.8


def test_the_first_task_is_fine_tuning(tiny: Table) -> None:
    task = Task(tiny.take(range(30)))
    replay, tuned = Replay.tiny(), Finetune.tiny()
    for learner in (replay, tuned):
        learner.learn(task)
    assert torch.equal(predict(replay.model, tiny), predict(tuned.model, tiny))


def test_each_batch_holds_new_rows_once_and_old_ones_from_the_buffer(tiny: Table) -> None:
    first, second = Task(tiny.take(range(30))), Task(tiny.take(range(30, 60)), index=1)
    learner, run = Replay.tiny(), Run()
    learner.learn(first, run)
    batches = list(learner.batches(second, 0, run))
    assert [len(batch) for batch in batches] == [30 + 16]
    pixels = batches[0].inputs["pixel_values"]

    def found_in(table: Table) -> int:
        rows = table.inputs["pixel_values"]
        return sum(bool((rows == row).flatten(1).all(1).any()) for row in pixels)

    assert found_in(second.train) == 30
    assert found_in(learner.kept.table) == 16


def test_rows_leave_the_buffer(tiny: Table) -> None:
    learner = Replay.tiny()
    learner.learn(Task(tiny))
    kept = learner.kept.table.ids
    assert len(kept) == 20
    gone = tiny.select(kept[:5])
    assert set(learner.drop(gone)) == set(gone.ids)
    assert learner.kept.holds(tiny.ids) == tuple(id for id in tiny.ids if id in kept[5:])


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner, run = Replay.tiny(), Run()
    learner.learn(Task(tiny.take(range(30))), run)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(Task(tiny.take(range(30, 60)), index=1), Run(seed=1))
    assert torch.equal(predict(learner.model, tiny), predict(twin.model, tiny))
    assert learner.kept.table.ids == twin.kept.table.ids
