"""Digits 0 to 4, then 5 to 9, and what can be compared of learners that took them in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from engram.core.learner import Learner, fresh
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.run import Run

OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
SMALL: dict[str, Any] = {"network": {"name": "MLP", "hidden": [32]}, "epochs": 3, "batch_size": 32}


def halves(table: Table) -> tuple[Task, Task]:
    """Two tasks of five classes each."""
    first, second = (Task(table.of_classes(c), index=i, classes=c) for i, c in enumerate((OLD, NEW)))
    return first, second


def learnt(learner: Any, table: Table, run: Run | None = None) -> Any:
    """The learner, when it has learnt both tasks."""
    run = run or Run()
    for task in halves(table):
        learner.learn(task, run)
    return learner


def begun(learner: Any, table: Table) -> Any:
    """The learner, when it has learnt the first task and is about to train on the second."""
    run = Run()
    first, second = halves(table)
    learner.learn(first, run)
    learner._prepare(second, run)
    learner.start(second, run)
    return learner


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def same(one: Learner, other: Learner) -> bool:
    """Are all weights equal, bit by bit?"""
    found, wanted = weights(one), weights(other)
    return found.keys() == wanted.keys() and all((found[name] == p).all() for name, p in wanted.items())


def finals(take: Any, stages: Any, *learners: Learner) -> list[float]:
    """The final accuracy of each learner along a stream, mean of two seeds."""
    return [
        sum(take(fresh(learner), stages, Run(seed=seed)).curve[-1] for seed in range(2)) / 2 for learner in learners
    ]


def spent(learner: Any, anchor: dict[str, Tensor], weight: dict[str, Tensor]) -> float:
    """How far parameters have come from an anchor, squared and weighted."""
    now = weights(learner)
    return float(sum((w * (now[name][: len(w)] - anchor[name][: len(w)]).square()).sum() for name, w in weight.items()))
