"""Checks of forgetters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from engram.core.forgetter import Forgetter
from engram.core.needs import Need, satisfied
from engram.core.request import Request
from engram.core.settings import name_of
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.testing.material import Material, check_row_alone, close, complete, condition, ensure, supplies


def check_model_is_untouched(method: Forgetter, material: Material) -> None:
    """The model that is handed over stays as it is, and shares no memory with the new one."""
    model = material.model()
    before = condition(model)
    new = method.forget(model, complete(method, material), Run())
    name = name_of(method)
    ensure(condition(model) == before, f"{name} changed the model that it was given")
    places = {t.data_ptr() for t in model.state_dict().values() if t.numel()}
    shared = [key for key, t in new.state_dict().items() if t.numel() and t.data_ptr() in places]
    ensure(new is not model and not shared, f"{name}'s new model shares memory with the old one: {shared[:3]}")
    check_row_alone(name, new, material.test)


class _Poison(Table):
    """Rows that a method has not declared to need: they have a number and ids; reading anything else fails."""

    armed = False

    def __getattribute__(self, name: str) -> Any:
        if name == "labels" and object.__getattribute__(self, "armed"):
            return None
        if name in _FORBIDDEN and object.__getattribute__(self, "armed"):
            raise AssertionError(f"the method read {name!r} of rows, and does not declare that it needs them")
        return super().__getattribute__(name)


_FORBIDDEN = frozenset({"inputs", "extra", "take", "select", "batch", "batches", "concat", "digest", "shapes"})


def _poisoned(table: Table) -> Table:
    poison = _Poison(table.inputs, table.labels, table.ids)
    object.__setattr__(poison, "armed", True)
    return poison


class _PoisonedThing:
    """Something else that a method has not declared to need."""

    def __init__(self, need: Need) -> None:
        self.__dict__["need"] = need

    def _read(self, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"the method used the {self.__dict__['need']}, and does not declare that it needs it")

    __call__ = __getattr__ = __getitem__ = __iter__ = _read


def check_forgetter_needs_are_honest(method: Forgetter, material: Material) -> None:
    """Each alternative of its needs suffices, where all that no alternative names is poison; with any part of all
    alternatives missing, it refuses before it works."""
    declared = frozenset().union(*method.needs)
    for needs in method.needs:
        request = _just(needs, declared, method, material)
        method.forget(material.model(), request, Run())
        for lacking in needs:
            rest = needs - {lacking}
            if not satisfied(method.needs, _implied(rest)):
                _refuses(method, _just(rest, declared, method, material), lacking, material)


def _implied(needs: frozenset[Need]) -> frozenset[Need]:
    """Labels are at hand only where rows are."""
    lost = {Need.FORGET_LABELS: Need.FORGET_ROWS, Need.RETAIN_LABELS: Need.RETAIN_ROWS}
    return frozenset(need for need in needs if need not in lost or lost[need] in needs)


def _refuses(method: Forgetter, request: Request, lacking: Need, material: Material) -> None:
    try:
        method.forget(material.model(), request, Run())
    except EngramError:
        return
    raise AssertionError(f"{name_of(method)} declares that it needs {lacking}, and works without")


def _just(needs: frozenset[Need], declared: frozenset[Need], method: Forgetter, material: Material) -> Request:
    """The request with these needs alone: what stands in `declared` besides is absent, the rest is poison."""
    full, there = material.request, supplies(method, material)
    unknown = needs - there.keys() - _ROWS.keys() - {Need.FORGET_LABELS, Need.RETAIN_LABELS}
    ensure(not unknown, f"the material cannot supply what {name_of(method)} needs: {', '.join(sorted(unknown))}")
    tables = {
        part: _supplied(getattr(full, part), need, _LABELS.get(need), needs, declared) for need, part in _ROWS.items()
    }
    poison = {need: _PoisonedThing(need) for need in there.keys() - declared}
    return full.but(**tables, at_hand={**poison, **{need: there[need] for need in there.keys() & needs}})


_ROWS = {Need.FORGET_ROWS: "forget", Need.RETAIN_ROWS: "retain", Need.GENERAL_ROWS: "general"}
_LABELS = {Need.FORGET_ROWS: Need.FORGET_LABELS, Need.RETAIN_ROWS: Need.RETAIN_LABELS}


def _supplied(
    table: Table, need: Need, labels: Need | None, needs: frozenset[Need], declared: frozenset[Need]
) -> Table | None:
    if need in needs:
        return table if labels is None or labels in needs else table.unlabelled()
    return None if need in declared else _poisoned(table)


def check_forgetter_is_exact(method: Forgetter, material: Material) -> None:
    """If declared exact: the new model is the same whichever rows the old one knew besides the retained ones."""
    if not method.exact:
        return
    retain = material.train.without(material.gone)
    pasts = [material.train.select(material.gone), material.test.take(torch.arange(len(material.gone)))]
    found = []
    for gone in pasts:
        known = retain.concat(gone)
        past = dataclasses.replace(material, tasks=(Task(retain), Task(gone)))
        request = Request.of_records(known, gone.ids).but(at_hand=supplies(method, past))
        found.append(predict(method.forget(material.recipe(known, 0), request, Run()), material.test))
    ensure(
        close(found[0], found[1], 1e-6),
        f"{name_of(method)} is declared exact, and its result depends on the forgotten rows",
    )
