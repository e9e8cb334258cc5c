"""A learner's history: what it has taken in, replayed without some rows. The recipe of models that learn in tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from engram.core.learner import Learner, fresh
from engram.core.settings import describe
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.errors import EngramError


@dataclass(frozen=True, repr=False)
class History:
    """Retraining for a learner: the same tasks in the same order, with the rows that are left.

    Callable as a recipe: `history(table, seed, run)` gives the model of a fresh learner that has learnt those rows of
    the tasks that stand in `table`. A task of which no row is left is skipped.
    """

    learner: Learner
    tasks: tuple[Task, ...]

    def __repr__(self) -> str:
        return f"History({describe(self.learner)}, {[(t.index, len(t.train)) for t in self.tasks]})"

    def __call__(self, table: Table, seed: int, run: Run | None = None) -> nn.Module:
        return self.learn(table, seed, run).model

    def learn(self, table: Table, seed: int, run: Run | None = None) -> Learner:
        """The learner itself, with its traces. EngramError if no row is left."""
        run = run or Run()
        with run.scope("history"):  # its checkpoints stand beside those of other replays of the same run and seed
            return self._replay(table, run.with_seed(seed))

    def _replay(self, table: Table, run: Run) -> Learner:
        twin = fresh(self.learner)
        for task in self.tasks:
            left = task.without(set(task.train.ids) - table.positions.keys())
            if len(left.train):
                twin.learn(left, run)
        if not twin.started:
            raise EngramError("no row of the history is left; there is nothing to retrain")
        twin.refresh(run)
        return twin


def rows_of(tasks: Sequence[Task]) -> Table:
    """All training rows of some tasks as one table."""
    first, *rest = [task.train for task in tasks]
    return first.concat(*rest) if rest else first
