"""Streams: tasks in order, each with the test rows that it is judged by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from engram.data.table import Table, Target
from engram.data.task import Task
from engram.errors import EngramError, unknown
from engram.stats.continual import Convention, class_order, split_sizes
from engram.stats.seeds import generator

SCENARIOS = ("class", "task", "domain", "single")


@dataclass(frozen=True)
class Stage:
    """A task, and the rows that say how well it was learnt. Learners see the task alone."""

    task: Task
    test: Table


def class_stream(
    train: Table,
    test: Table,
    *,
    base: int,
    increment: int,
    tasks: int | None = None,
    order: Convention = "natural",
    seed: int = 0,
) -> list[Stage]:
    """Tasks of new classes: `base` classes first, then `increment` at a time; `tasks` counts all of them, the
    base too.

    `order`: a published convention, see `stats.continual.class_order`. Class ids stay what they are in the
    table; the order says only when a class arrives. EngramError if the classes do not suffice for so many
    tasks, or if a task would have no test rows.
    """
    classes = _classes(train)
    arranged = [classes[i] for i in class_order(len(classes), order, seed)]
    sizes = split_sizes(len(classes), base, increment, tasks)
    stages, start = [], 0
    for index, size in enumerate(sizes):
        new = tuple(arranged[start : start + size])
        stages.append(_stage(train.of_classes(new), test.of_classes(new), index, new))
        start += size
    return stages


def domain_stream(train: Table, test: Table, column: str) -> list[Stage]:
    """One task for each value of an extra column, in order of its first appearance; the classes are the same
    in all.

    EngramError for a column that a table does not have, and a value that no test row has.
    """
    here, there = _values(train, column), _values(test, column)
    return [
        _stage(_equal(train, here, value), _equal(test, there, value), index, train.classes if index == 0 else ())
        for index, value in enumerate(dict.fromkeys(here))
    ]


def single(train: Table, test: Table) -> list[Stage]:
    """Everything at once: one task."""
    return [_stage(train, test, 0, train.classes)]


def online(stages: Sequence[Stage], batch: int, seed: int = 0) -> Iterator[Task]:
    """The same rows cut anew: one pass over each task in random order, `batch` rows at a time, without
    boundaries.

    Task numbers and announced classes are withheld (index counts pieces, `classes` are those of the piece).
    """
    count = 0
    for stage in stages:
        order = torch.randperm(len(stage.task.train), generator=generator("online", seed, stage.task.index))
        for rows in order.split(batch):
            piece = stage.task.train.take(rows)
            yield Task(piece, None, count, piece.classes, stage.task.names)
            count += 1


def stream(train: Table, test: Table, scenario: str = "class", **settings: object) -> list[Stage]:
    """A stream by the name of its scenario: class, task (the same stages; probes may use the task's classes),
    domain
    (`column`), single."""
    if scenario not in SCENARIOS:
        raise unknown("scenario", scenario, SCENARIOS)
    if scenario in ("class", "task"):
        return class_stream(train, test, **settings)  # type: ignore[arg-type]
    return domain_stream(train, test, **settings) if scenario == "domain" else single(train, test)  # type: ignore[arg-type]


def _stage(train: Table, test: Table, index: int, classes: tuple[int, ...]) -> Stage:
    if not len(test):
        raise EngramError(
            f"task {index} (classes {list(train.classes)}) has no test rows; give test rows of its classes"
        )
    return Stage(Task(train, None, index, classes, train.names), test)


def _classes(train: Table) -> tuple[int, ...]:
    if train.target != Target.CLASSES:
        raise EngramError(f"a class stream needs class labels; this table's target is {train.target}")
    return train.classes


def _values(table: Table, column: str) -> list[object]:
    if column not in table.extra:
        raise unknown("column", column, table.extra)
    values = table.extra[column]
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)


def _equal(table: Table, values: list[object], value: object) -> Table:
    return table.take([entry == value for entry in values])
