"""A forget event: the model, every trace, what was derived from them, in this order; and what stays behind is told."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from engram.core.erasure import Done, forget
from engram.core.forgetter import Forgetter
from engram.core.learner import Learner
from engram.core.request import Records, Request
from engram.core.trace import Seen
from engram.data.table import Ids, Table
from engram.data.task import Task
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.gradient_ascent import GradientAscent
from engram.keep.finetune import Finetune
from engram.keep.nmc import NMC
from engram.keep.replay import Replay
from engram.testing import condition, digits, fingerprint, learnt


class Diary(Seen):
    """A trace that notes when it was asked to drop."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def drop(self, rows: Table) -> Ids:
        self.log.append(f"drop {len(rows)}")
        return super().drop(rows)


@dataclass(kw_only=True, eq=False)
class Noted(Learner):
    """A learner that notes what happens to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.log: list[str] = []
        self.first = self.trace("first", Diary(self.log))
        self.second = self.trace("second", Diary(self.log))

    def learn(self, task: Task, run: Run | None = None) -> None:
        self.model = nn.Identity()
        self.first.add(task.train.ids)

    def refresh(self, run: Run | None = None) -> None:
        self.log.append("refresh")


@dataclass(kw_only=True, eq=False)
class Own(Noted):
    """One that forgets by itself."""

    def forget(self, request: Request, run: Run | None = None) -> Ids:
        self.log.append("own forget")
        return request.ids[:1]


@dataclass(kw_only=True, eq=False)
class Named(Forgetter):
    """Gives a model that can be told by its type."""

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        return nn.Flatten()


@dataclass(kw_only=True, eq=False)
class Failing(Forgetter):
    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        raise EngramError("cannot")


@pytest.fixture
def table() -> Table:
    return Table({"values": torch.zeros(4, 2)}, torch.tensor([0, 0, 1, 1]), tuple("abcd"))


def taught(learner: Noted, table: Table) -> Noted:
    learner.learn(Task(table))
    return learner


def test_model_then_traces_then_what_is_derived(table: Table) -> None:
    learner = taught(Noted(), table)
    done = forget(learner, Request.of_records(table, ("b", "c")), Named())
    assert learner.log == ["drop 2", "drop 2", "refresh"]  # every trace, though only one holds the rows
    assert isinstance(learner.model, nn.Flatten)
    assert done == Done(f"{__name__}.Named", False, ("b", "c"))
    assert learner.holds("abcd") == ("a", "d")


def test_its_own_way_of_forgetting_goes_before(table: Table) -> None:
    learner = taught(Own(), table)
    done = forget(learner, Request.of_records(table, ("b", "c")))
    assert learner.log == ["own forget", "refresh"]
    assert done == Done(f"{__name__}.Own", False, ("b",))


def test_a_forgetter_that_is_named_is_used_although_the_learner_could(table: Table) -> None:
    learner = taught(Own(), table)
    forget(learner, Request.of_records(table, ("a",)), Named())
    assert learner.log == ["drop 1", "drop 1", "refresh"] and isinstance(learner.model, nn.Flatten)


def test_nothing_happens_where_nothing_can_be_done(table: Table) -> None:
    learner = taught(Noted(), table)
    with pytest.raises(EngramError, match=r"Noted cannot forget by itself; name a forgetter"):
        forget(learner, Request.of_records(table, ("a",)))
    with pytest.raises(EngramError, match="cannot"):
        forget(learner, Request.of_records(table, ("a",)), Failing())
    assert learner.log == [] and learner.holds("abcd") == tuple("abcd") and isinstance(learner.model, nn.Identity)


def test_rows_that_are_gone_leave_residue_where_a_trace_holds_them(table: Table) -> None:
    learner = taught(Noted(), table)
    done = forget(learner, Request(Records(("a", "stranger"))), Named())
    assert done.residue == ("a",) and learner.log == ["refresh"]


@pytest.mark.parametrize("learner", [Finetune.tiny(), Replay.tiny()], ids=lambda learner: type(learner).__name__)
def test_trained_weights_are_residue_and_the_buffer_is_not(learner: Learner) -> None:
    material = digits()
    held = learnt(learner, material.tasks, Run())
    before = condition(held.model)
    done = forget(held, material.request, GradientAscent.tiny(), Run())
    assert done.residue == material.gone and not done.exact and done.method == "forget.GradientAscent"
    assert condition(held.model) != before
    for name in held.traces.keys() - {"seen"}:
        assert held.traces[name].holds(material.gone) == ()


def test_requests_follow_one_another_and_learning_goes_on() -> None:
    material = digits()
    first, second = material.tasks
    learner, never = learnt(NMC(), [first], Run()), learnt(NMC(), [first.without(set(first.train.ids[:10]))], Run())
    for part in (slice(0, 5), slice(5, 10)):
        done = forget(learner, Request.of_records(first.train, first.train.ids[part]))
        assert done == Done("keep.NMC", True, ())
    for one in (learner, never):
        one.learn(second)
    assert torch.allclose(predict(learner.model, material.test), predict(never.model, material.test), atol=1e-6)


def test_a_request_that_is_refused_leaves_the_learner_as_it_was() -> None:
    material = digits()
    learner = learnt(NMC(), material.tasks[:1], Run())
    before = fingerprint(learner.state_dict())
    stranger = Request.of_records(material.test, material.test.ids[:1])
    with pytest.raises(EngramError, match="was never learnt"):
        forget(learner, stranger)
    with pytest.raises(EngramError, match="not at hand"):
        forget(learner, Request(Records(material.gone)))
    assert fingerprint(learner.state_dict()) == before
