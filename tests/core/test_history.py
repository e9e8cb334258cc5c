"""A learner's history replayed with the rows that are left."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from engram.core.history import History, rows_of
from engram.core.learner import Learner
from engram.data.task import Task
from engram.engine import fit as fitting
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.joint import Joint
from engram.keep.nmc import NMC
from engram.keep.replay import Replay
from engram.models.io import digest
from engram.testing import digits, fingerprint, learnt

TASKS = digits().tasks
MAKERS = [NMC.tiny(), Replay.tiny(), Joint.tiny()]
kinds = pytest.mark.parametrize("learner", MAKERS, ids=lambda learner: type(learner).__name__)


@kinds
def test_with_all_rows_it_is_what_the_learner_became(learner: Learner) -> None:
    again = History(learner, TASKS).learn(digits().train, 3)
    assert fingerprint(again.state_dict()) == fingerprint(learnt(learner, TASKS, Run(seed=3)).state_dict())


@kinds
def test_without_some_rows_it_never_saw_them(learner: Learner) -> None:
    gone = set(digits().gone)
    again = History(learner, TASKS).learn(digits().train.without(gone), 3)
    never = learnt(learner, [task.without(gone) for task in TASKS], Run(seed=3))
    assert again.holds(gone) == () and set(again.holds(digits().train.ids)) == set(digits().train.ids) - gone
    assert digest(again.model) == digest(never.model)


def test_the_learner_that_was_handed_over_learns_nothing() -> None:
    learner = learnt(NMC(), TASKS[:1], Run())
    before = fingerprint(learner.state_dict())
    History(learner, TASKS)(digits().train, 0)
    assert fingerprint(learner.state_dict()) == before


def test_a_task_without_rows_is_skipped() -> None:
    model = History(NMC(), TASKS)(TASKS[1].train, 0)
    assert torch.equal(predict(model, digits().test), predict(learnt(NMC(), TASKS[1:], Run()).model, digits().test))


def test_a_class_without_rows_is_not_announced() -> None:
    left = digits().train.without(digits().train.of_classes([2]).ids)
    model = History(Replay.tiny(), TASKS)(left, 0)
    assert not bool(model.head.live[2]) and bool(model.head.live[3])  # type: ignore[union-attr, index, operator]


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(EngramError, match="no row of the history is left"):
        History(NMC(), TASKS)(digits().test, 0)


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    history = History(Replay.tiny(), TASKS)
    models = [digest(history(digits().train, seed)) for seed in (1, 1, 2)]
    assert models[0] == models[1] != models[2]


@kinds
def test_replays_of_one_run_do_not_take_each_others_checkpoints(learner: Learner, tmp_path: Path) -> None:
    """Long trainings leave a checkpoint; another one of the same run and seed must not start from it."""
    history, fewer = History(learner, TASKS), digits().train.without(digits().gone)
    wanted = [digest(history(rows, 1)) for rows in (digits().train, fewer)]
    run = Run(tmp_path)
    with mock.patch.object(fitting, "WORTH_KEEPING", -1.0):
        found = [digest(history(rows, 1, run)) for rows in (digits().train, fewer)]
    assert found == wanted


def test_rows_of_tasks_are_one_table() -> None:
    assert rows_of(TASKS).ids == (*TASKS[0].train.ids, *TASKS[1].train.ids)
    assert rows_of(TASKS[:1]) is TASKS[0].train


def test_what_it_prints_tells_histories_apart() -> None:
    whole, less = History(NMC(), TASKS), History(NMC(), (TASKS[0], Task(TASKS[1].train.take([0, 1]), None, 1)))
    assert repr(whole) == repr(History(NMC(), TASKS))
    assert len({repr(whole), repr(less), repr(History(Replay(), TASKS))}) == 3
