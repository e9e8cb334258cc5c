"""A learner along a chronological stream: after each task its error there, and what all of it has cost so far.

The environment of Bornschein et al.: NEVIS'22, 2022, arXiv 2211.11747: learn a task, add what it took, predict its
held-out rows, once, then go on. Errors are 1 - accuracy among the task's classes, or 1 - mean average precision; their
mean over tasks counts each task once, whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engram.core.learner import Learner
from engram.core.settings import name_of
from engram.data.chronological import Dated
from engram.engine.predict import error_of
from engram.engine.run import Run


@dataclass(frozen=True)
class Record:
    """A task that was learnt: `error` on the `rows` that were asked; `flops` from the beginning of the stream on, 2 per
    multiply-add; `parameters` that the learner's model has now."""

    name: str
    year: int
    kind: str
    rows: int
    error: float
    flops: float
    parameters: int


def follow(
    learner: Learner, events: Sequence[Dated], run: Run | None = None, on: Literal["dev_test", "test"] = "dev_test"
) -> list[Record]:
    """Take a learner along a stream; it is judged on dev_test rows, or at the end of all development on test rows.

    Each event is a phase of the run, journaled with the learner's whole state: in a directory, an interrupted course
    goes on behind the last finished event, to the same records. The learner never sees `dev_test` and `test`.
    """
    run = run or Run()
    records: list[Record] = []
    with run.scope("chronicle", name_of(learner)):
        for index, event in enumerate(events):
            found = _Event(learner, event, on, records[-1].flops if records else 0.0, run)
            entry = run.phase(f"event {index}", found.happen)
            if not found.happened:
                learner.load_state_dict(entry["learner"])
            records.append(Record(**entry["record"]))
    return records


@dataclass
class _Event:
    learner: Learner
    event: Dated
    on: str
    total: float
    run: Run
    happened: bool = False

    def happen(self) -> dict[str, Any]:
        """Learn the task, and look; the record, and the learner's state where it may be asked for again."""
        self.happened = True
        record = asdict(_record(self.learner, self.event, self.on, self.total, self.run))
        return {"record": record, "learner": None if self.run.directory is None else self.learner.state_dict()}


def _record(learner: Learner, event: Dated, on: str, total: float, run: Run) -> Record:
    before = run.cost.flops
    if getattr(learner, "counts_flops", False):
        learner.learn(event.task, run)
    else:
        with run.cost.counting():
            learner.learn(event.task, run)
    learner.refresh(run)
    spent = total + run.cost.flops - before
    asked = event.dev_test if on == "dev_test" else event.test
    classes = event.task.classes or event.task.train.classes
    error = error_of(learner.model, asked, classes, run)
    parameters = sum(p.numel() for p in learner.model.parameters())
    return Record(event.name, event.year, event.kind, len(asked), error, spent, parameters)


def mean_error(records: Iterable[Record]) -> float:
    """The mean over tasks, each counted once."""
    errors = [record.error for record in records]
    return sum(errors) / len(errors)


def curve(records: Sequence[Record]) -> list[tuple[float, float]]:
    """(operations so far, mean error so far) after each task."""
    return [(record.flops, mean_error(records[: k + 1])) for k, record in enumerate(records)]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, error) no other one beats: none is as good in both and better in one. By cost, then error."""
    best = float("inf")
    found: list[int] = []
    for k in sorted(range(len(points)), key=lambda k: points[k]):
        if points[k][1] < best or (found and points[k] == points[found[-1]]):
            best = points[k][1]
            found.append(k)
    return found
