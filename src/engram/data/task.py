"""A task: what arrives together, and nothing that a learner must not see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engram.data.table import Table, Target


@dataclass(frozen=True)
class Task:
    """Training rows that arrive together. It carries no test rows, so none can leak.

    `index`: 0 is the base task. `classes`: the class ids that are new; where a row may have several labels (0 or 1,
    [n, k]), those of its k columns; empty for regression, text and unlabelled rows. `names`: class names, for the
    learners that use them.
    """

    train: Table
    valid: Table | None = None
    index: int = 0
    classes: tuple[int, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)

    def without(self, ids: set[str]) -> Task:
        """The same task without the training rows that have these ids."""
        train = self.train.without(ids)
        left = set(train.classes) if train.target == Target.CLASSES else set(self.classes)
        classes = tuple(c for c in self.classes if c in left)
        valid = None if self.valid is None else self.valid.without(ids)
        return Task(train, valid, self.index, classes, self.names)
