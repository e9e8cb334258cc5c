"""The template of learners on a frozen encoder, which keep sums over rows: rows can be taken out of sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engram.core.learner import Learner, require_labels
from engram.core.needs import NOTHING, Need, Needs, needs, require_processes
from engram.core.request import Request
from engram.core.settings import name_of
from engram.core.trace import State
from engram.data.table import MISSING, Ids, Table, Target
from engram.data.task import Task
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.frozen import frozen_encoder
from engram.models.predictor import Predictor


class Sums(Protocol):
    """Sums over rows: `stats.moments.ClassMeans`, `stats.ridge.Ridge`."""

    def add(self, x: Tensor, y: Tensor) -> None: ...
    def remove(self, x: Tensor, y: Tensor) -> None: ...
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


class SummedRows:
    """A trace: sums over the features of rows, and the label of every row that is in them.

    `encode(table)` gives what is summed: (features [n, d], labels or targets). Rows leave exactly, up to
    rounding, if they come with the contents that they had when they went in; their labels are remembered, so
    none need come. `removal`: further arguments of the sums' `remove`.
    """

    def __init__(
        self, make: Callable[[int], Sums], encode: Callable[[Table], tuple[Tensor, Tensor]], **removal: Any
    ) -> None:
        self.make, self.encode, self.removal = make, encode, removal
        self.sums: Any = None
        self.width = 0
        self.labels: dict[str, int] = {}

    def add(self, table: Table) -> None:
        """Take rows in; EngramError for a row without a label, and for an id that is in already."""
        labels = _labels(table)
        twice = self.holds(table.ids)
        if twice:
            raise EngramError(f"the record {twice[0]!r} was learnt before; forget it first to learn it anew")
        x, y = self.encode(table)
        if self.sums is None:
            self.width = x.shape[1]
            self.sums = self.make(self.width)
        self.sums.add(x, y)
        self.labels.update(labels)

    def holds(self, ids: Iterable[str]) -> Ids:
        return tuple(id for id in ids if id in self.labels)

    def drop(self, rows: Table) -> Ids:
        """Take rows out; what was never learnt is left alone. No residue."""
        held = rows.select(self.holds(rows.ids))
        if len(held):
            learnt = held.with_labels(torch.tensor([self.labels[id] for id in held.ids]))
            self.sums.remove(*self.encode(learnt), **self.removal)
            for id in held.ids:
                del self.labels[id]
        return ()

    def state_dict(self) -> State:
        sums = None if self.sums is None else dict(self.sums.state_dict())
        ids = sorted(self.labels)
        return {"ids": ids, "labels": [self.labels[id] for id in ids], "width": self.width, "sums": sums}

    def load_state_dict(self, state: State) -> None:
        self.labels = dict(zip(state["ids"], state["labels"], strict=True))
        self.width, self.sums = state["width"], None
        if state["sums"] is not None:
            self.sums = self.make(self.width)
            self.sums.load_state_dict(state["sums"])


def _labels(table: Table) -> dict[str, int]:
    """The class of every row, by id."""
    if table.target != Target.CLASSES or table.labels is None:
        raise EngramError(f"a frozen learner wants rows with class labels, and the target of these is {table.target}")
    labels = dict(zip(table.ids, table.labels.tolist(), strict=True))
    missing = [id for id, label in labels.items() if label == MISSING]
    if missing:
        raise EngramError(f"the record {missing[0]!r} has no label; a frozen learner learns from labelled rows only")
    return labels


@dataclass(kw_only=True, eq=False)
class FrozenLearner(Learner):
    """A head over a frozen encoder.

    `backbone`: a module, a model directory or a name; None takes the rows themselves as features. Hooks:
    `encoder` (what stands under the head), `new_head`, `solve` (set the head from what was summed).
    """

    backbone: Any = None

    @property
    def needs(self) -> Needs:
        return NOTHING if self.backbone is None else needs({Need.BACKBONE})

    def features(self, table: Table, run: Run | None = None) -> Tensor:
        """Features [n, d] of rows, as the head sees them."""
        encoder = self.model.encoder
        assert isinstance(encoder, nn.Module)
        return predict(encoder, table, "pooler_output", run=run)

    def begin(self, task: Task, run: Run) -> None:
        """Build the predictor for the first task, make room for new classes; EngramError without labels."""
        require_processes(name_of(self), self.processes)
        _labels(task.train)
        require_labels(task)
        if not self.started:
            encoder = self.encoder(task, run).eval().requires_grad_(False)
            self.model = Predictor(encoder, self.new_head(int(encoder.width)))  # type: ignore[arg-type]
        self.head.grow(task.classes or task.train.classes, run.generator("head"))

    @property
    def head(self) -> Any:
        """The model's head."""
        return self.model.head

    def encoder(self, task: Task, run: Run) -> nn.Module:
        """The encoder under the head. EngramError, without a backbone, for rows that are no features themselves."""
        if self.backbone is None and not {"values", "pixel_values"} & set(task.train.inputs):
            raise EngramError(
                f"{name_of(self)} without a backbone takes numbers or images as features (values, pixel_values), and "
                f"these rows have {', '.join(task.train.inputs) or 'neither'}; give it a backbone that reads them, or "
                "columns of numbers"
            )
        return frozen_encoder(self.backbone, inputs=task.train.shapes, generator=run.generator("backbone"))

    def new_head(self, width: int) -> nn.Module:
        """An empty head over `width` features."""
        raise NotImplementedError

    def solve(self, run: Run) -> None:
        """Set the head from what was summed."""
        raise NotImplementedError

    def put(self, classes: Tensor, *rows: Tensor) -> None:
        """Set the head's rows of these classes, and retire every other class."""
        self.retire_all_but(classes)
        self.head.set(classes, *rows)

    def retire_all_but(self, classes: Tensor) -> None:
        """Take every class out of the head that is not among these."""
        born = self.head.classes
        self.head.retire(born[~torch.isin(born, classes.to(born))])

    def refresh(self, run: Run | None = None) -> None:
        """Solve the head anew, from the traces alone."""
        if self.started:
            self.solve(run or Run())

    def forget(self, request: Request, run: Run | None = None) -> Ids:
        """Take the request's rows out of every trace and solve the head anew; the residue.

        EngramError, and nothing changed, if the forget rows are not at hand or one of them was never learnt.
        """
        if request.forget is None:
            raise EngramError(f"{type(self).__name__} forgets by subtracting rows, and the forget rows are not at hand")
        stranger = set(request.forget.ids) - set(self.holds(request.forget.ids))
        if stranger:
            raise EngramError(f"the record {min(stranger)!r} was never learnt, or is forgotten already; leave it out")
        residue = self.drop(request.forget)
        self.refresh(run)
        return tuple(dict.fromkeys((*residue, *self.holds(request.ids))))

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        if self.started:
            self.model.encoder.requires_grad_(False)
