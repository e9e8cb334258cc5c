"""The protocol of learners, and what all of them share: registered parts, state, traces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from engram.core.needs import NOTHING, Needs
from engram.core.request import Request
from engram.core.settings import name_of, settings
from engram.core.trace import State, Trace
from engram.data.table import IGNORED, MISSING, Ids, Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.errors import EngramError, at_least


@dataclass(kw_only=True, eq=False)
class Learner:
    """Takes tasks in, one after the other.

    A subclass is a dataclass whose fields are its hyper-parameters (making one does no work and draws no random
    number), and implements `learn`. `model` is always the whole predictor. State that rows went into is registered as
    a trace in `__post_init__`: `self.means = self.trace("means", Means())`.
    """

    exact: ClassVar[bool] = False  # does `forget` equal never having learnt the rows?
    processes: ClassVar[str] = "exact"  # exact, statistical or one: what two processes give
    growth: ClassVar[str] = "per class"  # flat, per class, per class pair, per task, per row

    def __post_init__(self) -> None:
        self._model: nn.Module | None = None
        self.traces: dict[str, Trace] = {}

    @property
    def needs(self) -> Needs:
        """Alternatives of what it cannot do without; a property of the instance."""
        return NOTHING

    @property
    def model(self) -> nn.Module:
        """The whole predictor. EngramError before the first task."""
        if self._model is None:
            raise EngramError(f"{type(self).__name__} has learnt nothing yet; call learn(task) first")
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = model

    @property
    def started(self) -> bool:
        """Is there a model yet?"""
        return self._model is not None

    def trace(self, name: str, part: Any) -> Any:
        """Register a part that rows go into; it is saved, and asked when something must be forgotten."""
        self.traces[name] = part
        return part

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Take a task in."""
        raise NotImplementedError

    def refresh(self, run: Run | None = None) -> None:
        """Rebuild derived parts of the model from the traces. Idempotent; called before anybody reads `model`."""

    def holds(self, ids: Iterable[str]) -> Ids:
        """Those of the ids that any trace still holds."""
        wanted = tuple(ids)
        found = {id for part in self.traces.values() for id in part.holds(wanted)}
        return tuple(id for id in wanted if id in found)

    def drop(self, rows: Table) -> Ids:
        """Take rows out of every trace; the ids of which something stays behind (the residue)."""
        left = {id for part in self.traces.values() for id in part.drop(rows)}
        return tuple(id for id in rows.ids if id in left)

    def state_dict(self) -> State:
        """The model as (config, weights), the traces, and what `extra_state` adds."""
        from engram.models.io import pack

        return {
            "model": None if self._model is None else list(pack(self._model)),
            "traces": {name: part.state_dict() for name, part in self.traces.items()},
            "extra": self.extra_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Become the learner that `state_dict` described; it can go on learning."""
        from engram.models.io import unpack

        self._model = None if state["model"] is None else unpack(*state["model"])
        for name, part in self.traces.items():
            part.load_state_dict(state["traces"][name])
        self.load_extra_state(state["extra"])

    def extra_state(self) -> State:
        """State besides the model and the traces (a counter, an anchor); none unless a subclass has it."""
        return {}

    def load_extra_state(self, state: State) -> None:
        """Take back what `extra_state` gave."""


@runtime_checkable
class Forgetful(Protocol):
    """A learner that can forget by itself."""

    def forget(self, request: Request, run: Run | None = None) -> Ids:
        """Take the request's rows out of model and traces; the residue ids, none where forgetting is exact."""


def require_labels(task: Task) -> None:
    """EngramError for a task of which no row has a label: there is nothing to learn from."""
    labels = task.train.labels
    if labels is None or not len(labels):
        known = False
    elif labels.is_floating_point():
        known = not bool(labels.isnan().all())
    else:
        known = bool((labels != (MISSING if labels.ndim == 1 else IGNORED)).any())
    if not known:
        raise EngramError(
            f"task {task.index} holds no row with a label, so there is nothing to learn from; leave it out"
        )


def fork(learner: Learner) -> Learner:
    """An independent copy, through its state; never a deep copy of anything alive."""
    twin = fresh(learner)
    twin.load_state_dict(learner.state_dict())
    return twin


def batched(learner: Learner, size: int) -> Learner:
    """An independent copy with another batch size. EngramError for a learner that has none."""
    if "batch_size" not in settings(learner):
        raise EngramError(f"{name_of(learner)} has no batch_size; leave it out")
    at_least("the batch size", size, 1)
    twin = replace(learner, batch_size=size)  # type: ignore[call-arg]
    twin.load_state_dict(learner.state_dict())
    return twin


def fresh(learner: Learner) -> Learner:
    """A learner of the same kind and settings that has learnt nothing."""
    return type(learner)(**settings(learner))
