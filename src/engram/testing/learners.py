"""Checks of learners."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torch import Tensor

from engram.core.erasure import forget
from engram.core.learner import Forgetful, Learner
from engram.core.needs import Need
from engram.core.persist import load_learner, save_learner
from engram.core.request import Request
from engram.core.settings import describe, name_of
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.journal import flatten
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.testing.material import Material, check_row_alone, close, condition, ensure, fingerprint, fresh, learnt


def check_prediction_is_of_the_row_alone(learner: Learner, material: Material) -> None:
    """A row alone is told the same as in a batch with others."""
    check_row_alone(name_of(learner), learnt(learner, material.tasks, Run()).model, material.test)


def check_looking_changes_nothing(learner: Learner, material: Material) -> None:
    """Predictions, questions and a further refresh leave a learner as it is."""
    twin = learnt(learner, material.tasks, Run())
    before, model = fingerprint(twin.state_dict()), condition(twin.model)
    predict(twin.model, material.test)
    twin.holds(material.gone)
    describe(twin)
    ensure(fingerprint(twin.state_dict()) == before, f"{name_of(learner)} changed by being looked at")
    ensure(condition(twin.model) == model, f"{name_of(learner)}'s model changed by being looked at")
    twin.refresh(Run())
    ensure(fingerprint(twin.state_dict()) == before, f"{name_of(learner)} changed by a second refresh")


class _Secretive(Task):
    """A task that does not tell what the learner has not declared to need."""

    hidden: frozenset[str] = frozenset()

    def __getattribute__(self, name: str) -> Any:
        if name in object.__getattribute__(self, "hidden"):
            raise AssertionError(f"the learner read {name!r} of a task, and does not declare that it needs it")
        return super().__getattribute__(name)


def check_learner_needs_are_honest(learner: Learner, material: Material) -> None:
    """It learns without the borders of tasks and the names of classes, unless it declares that it needs them."""
    declared = frozenset().union(*learner.needs)
    told = {"index": Need.BOUNDARIES, "names": Need.CLASS_NAMES}
    hidden = frozenset(name for name, need in told.items() if need not in declared)
    twin = fresh(learner)
    for task in material.tasks:
        secretive = _Secretive(task.train, task.valid, task.index, task.classes, task.names)
        object.__setattr__(secretive, "hidden", hidden)
        twin.learn(secretive, Run())
    twin.refresh(Run())
    ensure(twin.started, f"{name_of(learner)} has no model after learning")


def check_traces_are_complete(learner: Learner, material: Material) -> None:
    """It says of every row that it learnt it; dropped rows leave no id and no contents behind."""
    twin = learnt(learner, material.tasks, Run())
    rows = material.train.select(material.gone)
    name = name_of(learner)
    ensure(twin.holds(rows.ids) == rows.ids, f"{name} was trained on rows, and does not say that it holds them")
    stranger = material.test.ids
    ensure(twin.holds(stranger) == (), f"{name} says that it holds rows that it never saw")
    residue = twin.drop(rows)
    ensure(not (learner.exact and residue), f"{name} is declared exact, and {len(residue)} rows leave residue")
    twin.refresh(Run())
    ensure(twin.holds(rows.ids) == (), f"{name} still holds rows after they were dropped")
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(flatten(twin.state_dict(), tensors))
    left = [id for id in rows.ids if json.dumps(id) in tree]
    ensure(not left, f"{name}'s state still names {len(left)} dropped rows, such as {left[:1]}")
    stained = [key for key, value in tensors.items() if _holds_contents(value, rows)]
    ensure(not stained, f"{name}'s state still holds the contents of dropped rows")


def _holds_contents(value: Tensor, rows: Table) -> bool:
    """Does a row of the tensor equal a row of an input?"""
    for column in rows.inputs.values():
        wanted = column.reshape(len(column), -1).double()
        alike = value.ndim >= 2 and len(value) and value[0].numel() == wanted.shape[1]
        if alike and bool((value.reshape(len(value), 1, -1).double() == wanted).all(2).any()):
            return True
    return False


def check_forgetting_is_exact(learner: Learner, material: Material) -> None:
    """If declared exact: learning all and forgetting some equals never having learnt them, within 1e-6."""
    if not learner.exact:
        return
    ensure(isinstance(learner, Forgetful), f"{name_of(learner)} is declared exact, and cannot forget by itself")
    whole = Request.of_classes(material.train, (3,))
    for request in (material.request, whole):
        forgetful = learnt(learner, material.tasks, Run())
        done = forget(forgetful, request, None, Run())
        never = learnt(learner, [task.without(set(request.ids)) for task in material.tasks], Run())
        ensure(done.residue == (), f"{name_of(learner)} is declared exact, and leaves residue")
        found, wanted = predict(forgetful.model, material.test), predict(never.model, material.test)
        ensure(
            close(found, wanted[:, : found.shape[1]], 1e-6),
            f"{name_of(learner)} is declared exact, and differs from never having learnt the rows "
            f"by up to {_distance(found, wanted):.1e}",
        )


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).nan_to_num(0.0, 0.0, 0.0).abs().max()) if one.shape == other.shape else math.inf


def after_round_trip(learners: Mapping[str, Learner], material: Material) -> dict[str, str]:
    """For each learner, by name: its fingerprint (or the error) when it has learnt the first task, was saved, was
    loaded by a fresh process, and has learnt the second task there."""
    with tempfile.TemporaryDirectory() as folder:
        for name, learner in learners.items():
            save_learner(learnt(learner, material.tasks[:1], Run()), Path(folder) / name)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            places = {name: Path(folder) / name for name in learners}
            return pool.submit(_go_on_all, places, material.tasks[1]).result()


def _go_on_all(places: Mapping[str, Path], task: Task) -> dict[str, str]:
    found = {}
    for name, place in places.items():
        try:
            found[name] = go_on(load_learner(place)[0], task)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def go_on(learner: Learner, task: Task) -> str:
    """The fingerprint of a learner that has taken in one more task."""
    run = Run(seed=1)
    learner.learn(task, run)
    learner.refresh(run)
    return fingerprint(learner.state_dict())


def check_round_trip(learner: Learner, material: Material, found: str | None = None) -> None:
    """Saved, loaded in a fresh process and taught on, it ends with the same bits as without. `found`: what
    `after_round_trip` gave, where that was done for several learners at once."""
    name = name_of(learner)
    wanted = go_on(learnt(learner, material.tasks[:1], Run()), material.tasks[1])
    found = found or after_round_trip({name: learner}, material)[name]
    ensure(found == wanted, f"{name} was saved, loaded and taught on, and became another ({found})")
