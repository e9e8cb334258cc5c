"""Tasks that nobody hopes for: every learner takes them, or says in one sentence why not."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
import torch

from engram import catalogue
from engram.compare.growth import OF_IMAGES
from engram.core.learner import Learner
from engram.core.settings import load_class
from engram.data.table import MISSING, Table
from engram.data.task import Task
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError

LEARNERS = [row.name for row in catalogue.methods() if row.wing == "keep"]


def rows(name: str, classes: list[int], each: int, tag: str, size: int = 8) -> Table:
    shape, column = ((1, size, size), "pixel_values") if name in OF_IMAGES else ((size,), "values")
    labels = torch.tensor(classes).repeat_interleave(each)
    draws = torch.Generator().manual_seed(sum(map(ord, tag)))
    values = torch.rand(len(labels), *shape, generator=draws) + labels.view(-1, *[1] * len(shape)) / 10
    names = {c: f"class {c}" for c in range(20)}
    return Table({column: values}, labels, tuple(f"{tag}-{k}" for k in range(len(labels))), names=names)


def made(name: str) -> Learner:
    learner = load_class(name).tiny()  # type: ignore[attr-defined]
    if name == "keep.LingoCL":  # its own has names for ten classes
        learner = type(learner)(host=learner.host, encoder="random", width=32)
    return learner


def learn(learner: Learner, table: Table, index: int) -> None:
    learner.learn(Task(table, None, index, table.classes, table.names), Run())
    learner.refresh()


@pytest.fixture(params=LEARNERS)
def learner(request: pytest.FixtureRequest) -> Learner:
    """One that knows two classes."""
    found = made(request.param)
    learn(found, rows(request.param, [0, 1], 12, "first"), 0)
    return found


def name_of(learner: Learner) -> str:
    return f"keep.{type(learner).__name__}"


def test_classes_that_come_back(learner: Learner) -> None:
    again = rows(name_of(learner), [0, 1], 8, "again")
    with suppress(EngramError):
        learn(learner, again, 1)
    assert accuracy(learner.model, again, classes=(0, 1)) >= 0


def test_labels_with_gaps(learner: Learner) -> None:
    far = rows(name_of(learner), [4, 17], 10, "far")
    learn(learner, far, 1)
    told = predict(learner.model, far).argmax(1).unique().tolist()
    assert set(told) <= {0, 1, 4, 17}


def test_a_task_with_one_record(learner: Learner) -> None:
    with suppress(EngramError):
        learn(learner, rows(name_of(learner), [2], 1, "one"), 1)
    assert not bool(predict(learner.model, rows(name_of(learner), [0], 3, "new")).isnan().any())


def test_an_empty_test_set(learner: Learner) -> None:
    none = rows(name_of(learner), [0], 1, "none").take([])
    assert math.isnan(accuracy(learner.model, none)) and len(predict(learner.model, none)) == 0


def test_rows_of_another_size(learner: Learner) -> None:
    """Networks of their own take them; else a sentence says what is wrong, and the learner goes on."""
    with suppress(EngramError):
        learn(learner, rows(name_of(learner), [2, 3], 6, "large", size=12), 1)
    with pytest.raises(EngramError):
        predict(learner.model, rows(name_of(learner), [0], 3, "larger", size=13))
    assert not bool(predict(learner.model, rows(name_of(learner), [0], 3, "new")).isnan().any())


CLOSED_FORM = {f"keep.{name}" for name in ("NMC", "FeTrIL", "ACU", "SLDA", "JointHead", "ProtoNet")}  # in a later task
SHORT = {"keep.OnePrompt", "keep.L2P"}  # a task of so few rows takes fewer than three updates


class StoppedError(BaseException):
    """Somebody presses a key."""


@pytest.mark.parametrize("update", [1, 3])
def test_a_task_that_is_interrupted(learner: Learner, update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner goes on answering, and takes the task in when it comes again."""
    second, backward, count = rows(name_of(learner), [2, 3], 12, "second"), torch.Tensor.backward, []

    def stopped(loss: torch.Tensor, *given: Any, **settings: Any) -> None:
        count.append(1)
        if len(count) == update:
            raise StoppedError
        backward(loss, *given, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", stopped)
        with suppress(StoppedError):
            learn(learner, second, 1)
    interrupted = len(count) >= update
    assert interrupted or name_of(learner) in (CLOSED_FORM if update == 1 else CLOSED_FORM | SHORT)
    assert not bool(predict(learner.model, rows(name_of(learner), [0], 3, "new")).isnan().any())
    if interrupted:
        learn(learner, second, 1)
    assert set(predict(learner.model, second).argmax(1).tolist()) <= {0, 1, 2, 3}


def test_a_task_without_rows_or_labels(learner: Learner) -> None:
    some = rows(name_of(learner), [2], 6, "some")
    nobody = some.with_labels(torch.full((6,), MISSING))
    if type(learner).__name__ in ("Joint", "JointHead"):  # which have the rows of before
        learn(learner, some.take([]), 1)
    else:
        with pytest.raises(EngramError, match=r"no row with a label|has none"):
            learn(learner, some.take([]), 1)
    with pytest.raises(EngramError, match=r"no row with a label|has no label|has none"):
        learn(learner, nobody, 1)
    learn(learner, some, 2)  # and goes on
