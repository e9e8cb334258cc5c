"""Streams: tasks in order, each with the test rows that it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engram.data.table import Table, Target
from engram.data.task import Task
from engram.errors import EngramError, unknown
from engram.stats.continual import Convention, class_order, split_sizes
from engram.stats.seeds import generator

if TYPE_CHECKING:
    from engram.data.chronological import Dated


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


def few_shot(
    train: Table,
    test: Table,
    *,
    base: int,
    ways: int,
    shots: int,
    tasks: int | None = None,
    order: Convention = "natural",
    seed: int = 0,
) -> list[Stage]:
    """A base task of `base` classes with all their rows, then tasks of `ways` new classes with `shots` rows each.

    Test rows are not thinned out. `tasks`: only the first so many, the base counted too; the other classes never
    arrive. The rows of a class are drawn by (seed, class), whatever the order. Without a base (0) all tasks are of few
    shots. EngramError if a class has fewer rows, and as for `class_stream`.
    """
    stages = class_stream(train, test, base=base, increment=ways, order=order, seed=seed)
    if shots < 1 or not 1 <= (tasks or 1) <= len(stages):
        raise EngramError(f"{tasks} tasks of {shots} shots cannot be had: there are {len(stages)} tasks; shots from 1")
    first = 1 if base else 0
    few = [replace(stage, task=_thinned(stage.task, shots, seed)) for stage in stages[first:tasks]]
    return [*stages[:first], *few]


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


def chronological(path: str | Path, **settings: Any) -> list[Dated]:
    """Tasks by the year in which their data were published, as a YAML file lists them; see `data.chronological.build`,
    which takes the same arguments."""
    from engram.data.chronological import build

    return build(path, **settings)


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
    few-shot, domain (`column`), single, which takes no settings. EngramError for settings that are unknown or lacking.
    """
    if scenario not in SCENARIOS:
        raise unknown("scenario", scenario, SCENARIOS)
    if scenario == "single":
        return single(train, test)
    cut = SCENARIOS[scenario]
    _, _, *wanted = signature(cut).parameters.values()
    lacking = [p.name for p in wanted if p.default is p.empty and p.name not in settings]
    for name in settings:
        if name not in [p.name for p in wanted]:
            raise unknown(f"setting of a {scenario} stream", name, [p.name for p in wanted])
    if lacking:
        raise EngramError(f"a {scenario} stream needs {', '.join(lacking)}")
    return cut(train, test, **settings)


SCENARIOS: dict[str, Callable[..., list[Stage]]] = {
    "class": class_stream,
    "task": class_stream,
    "few-shot": few_shot,
    "domain": domain_stream,
    "single": single,
}


def _stage(train: Table, test: Table, index: int, classes: tuple[int, ...]) -> Stage:
    if not len(test):
        raise EngramError(
            f"task {index} (classes {list(train.classes)}) has no test rows; give test rows of its classes"
        )
    return Stage(Task(train, None, index, classes, train.names), test)


def _thinned(task: Task, shots: int, seed: int) -> Task:
    """The same task with `shots` rows of every class, in the order of the table."""
    assert task.train.labels is not None
    kept = [_few((task.train.labels == c).nonzero()[:, 0], c, shots, seed) for c in task.classes]
    return replace(task, train=task.train.take(torch.cat(kept).sort().values))


def _few(rows: torch.Tensor, label: int, shots: int, seed: int) -> torch.Tensor:
    if len(rows) < shots:
        raise EngramError(f"class {label} has {len(rows)} training rows, fewer than {shots} shots")
    return rows[torch.randperm(len(rows), generator=generator("shots", seed, label))[:shots]]


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
