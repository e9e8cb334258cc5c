"""What the test suite of engram, and of methods that others add, is written with.

`checks_of(method)` gives the checks that a method of its kind has to pass; each takes the method, configured as for a
quick test (its `tiny()`), and `Material`, and raises AssertionError with a sentence that says what is wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from engram.catalogue import Method
from engram.core.erasure import forget
from engram.core.forgetter import Forgetter
from engram.core.learner import Forgetful, Learner
from engram.core.needs import Need, Needs, satisfied
from engram.core.persist import load_learner, save_learner
from engram.core.probe import Probe, Subject
from engram.core.protector import Protector
from engram.core.request import Request
from engram.core.settings import describe, make, name_of, settings
from engram.data.table import Ids, Table
from engram.data.task import Task
from engram.engine import fit as fitting
from engram.engine.journal import Journal, flatten
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models import io

F = TypeVar("F", bound=Callable[..., object])


def holds(slug: str, *items: int) -> Callable[[F], F]:
    """Mark a test as the proof of items of a paper's list "what must hold", counted from 1.

    Several papers' items may be proved by one test: apply the marker once for each paper.
    """

    def mark(test: F) -> F:
        proved = [*getattr(test, "__holds__", []), *((slug, item) for item in items)]
        test.__holds__ = proved  # type: ignore[attr-defined]
        return test

    return mark


# --- what methods are checked with


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """Two tasks, test rows, and a recipe for models on the rows of both."""

    tasks: tuple[Task, Task]
    test: Table
    recipe: Recipe

    @cached_property
    def train(self) -> Table:
        """The rows of both tasks."""
        return self.tasks[0].train.concat(self.tasks[1].train)

    @property
    def gone(self) -> Ids:
        """The records that shall be forgotten: every fifth row of the first task."""
        return self.tasks[0].train.ids[::5]

    @cached_property
    def request(self) -> Request:
        """To forget these records, with everything at hand."""
        return Request.of_records(self.train, self.gone).but(general=self.test, at_hand={Need.RECIPE: self.recipe})

    def model(self) -> nn.Module:
        """A model of all training rows."""
        return self.recipe(self.train, 0)

    @cached_property
    def oracles(self) -> list[nn.Module]:
        """Two models of the retained rows."""
        retain = self.train.without(self.gone)
        return [self.recipe(retain, seed) for seed in (1, 2)]

    @cached_property
    def learner(self) -> Learner:
        """A learner that has taken in both tasks."""
        return learnt(make("keep.NMC"), self.tasks, Run())

    def subject(self) -> Subject:
        """This model, untouched by the request, with everything that a probe may ask for."""
        request, model = self.request, self.model()
        assert request.forget is not None and request.retain is not None
        rows = {"forget": request.forget, "retain": request.retain, "test": self.test}
        forgetter = make({"name": "forget.Finetune", "epochs": 1})
        given: dict[str, Any] = {"recipe": self.recipe, "forgetter": forgetter, "learner": self.learner}
        return Subject(model, before=model, request=request, rows=rows, **given)


@cache
def digits() -> Material:
    """Six training rows and three test rows of each of scikit-learn's handwritten digits; tasks of five classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images[:, None] / 16, dtype=torch.float32)
    ids = tuple(f"record {row}" for row in range(len(pixels)))
    table = Table({"pixel_values": pixels}, torch.tensor(data.target), ids)
    places = [np.flatnonzero(data.target == c) for c in range(10)]
    parts = slice(6), slice(6, 9)
    train, test = (table.take(sorted(int(row) for p in places for row in p[part])) for part in parts)
    halves = (tuple(range(5)), tuple(range(5, 10)))
    first, second = (Task(train.of_classes(half), None, k, half) for k, half in enumerate(halves))
    network = {"name": "MLP", "hidden": [16]}
    return Material((first, second), test, Recipe(network, Optimizer(lr=1e-2), 4, 16, tuple(range(10))))


# --- what can be compared


def fingerprint(value: Any) -> str:
    """SHA-256 over plain data, tensors and modules, bit by bit."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(flatten(value, tensors), sort_keys=True)
    return hashlib.sha256(tree.encode() + save_bytes(tensors)).hexdigest()


def contents(table: Table) -> dict[str, Any]:
    """All that stands in a table, as plain data and tensors."""
    extra = {name: value if isinstance(value, Tensor) else list(value) for name, value in table.extra.items()}
    return {"inputs": dict(table.inputs), "labels": table.labels, "ids": list(table.ids), "extra": extra}


def condition(model: nn.Module) -> str:
    """Everything about a model that must not change unasked: weights, buffers, modes, what is trainable, gradients."""
    modes = [module.training for module in model.modules()]
    trainable = [[p.requires_grad, p.grad is None] for p in model.parameters()]
    return fingerprint([io.digest(model), modes, trainable])


def fresh(method: Any) -> Any:
    """Another instance with the same settings."""
    return type(method)(**settings(method))


def learnt(learner: Learner, tasks: Sequence[Task], run: Run) -> Learner:
    """A fresh learner of the same settings that has taken in these tasks."""
    twin: Learner = fresh(learner)
    for task in tasks:
        twin.learn(task, run)
    twin.refresh(run)
    return twin


def outcome(method: Any, material: Material, run: Run) -> str:
    """The fingerprint of what a fresh instance makes of the material, from beginning to end."""
    if isinstance(method, Learner):
        return fingerprint(learnt(method, material.tasks, run).state_dict())
    if isinstance(method, Forgetter):
        return fingerprint(fresh(method).forget(material.model(), _complete(method, material), run))
    if isinstance(method, Probe):
        return fingerprint([finding.as_dict() for finding in fresh(method).examine(material.subject(), run)])
    assert isinstance(method, Protector), f"{name_of(method)} is no learner, forgetter, probe or protector"
    return fingerprint(contents(fresh(method).protect(material.train, run)))


def _complete(method: Forgetter, material: Material) -> Request:
    """The request, with the statistics that the method stores if it can."""
    return material.request.but(at_hand=_supplies(method, material))


def _supplies(method: Forgetter, material: Material) -> dict[Need, Any]:
    prepare = getattr(method, "prepare", None)
    stored = {} if prepare is None else {Need.STATISTICS: prepare(material.model(), material.train, Run())}
    return {Need.RECIPE: material.recipe, Need.ORACLES: material.oracles, **stored}


def ensure(condition: bool, sentence: str) -> None:
    """AssertionError with this sentence unless the condition holds."""
    if not condition:
        raise AssertionError(sentence)


# --- checks of every method


def check_config(method: Any, material: Material) -> None:
    """A method written out as plain JSON and made again is the same."""
    described = describe(method)
    again = describe(make(json.loads(json.dumps(described))))
    ensure(again == described, f"made again from its config it is another: {described} became {again}")


def check_untouched(method: Any, material: Material) -> None:
    """Tables and models that are handed over stay as they were."""
    request = material.request
    tables = [*(task.train for task in material.tasks), material.train, material.test, request.forget, request.retain]
    before = [fingerprint(contents(table)) for table in tables if table is not None]
    outcome(method, material, Run())
    after = [fingerprint(contents(table)) for table in tables if table is not None]
    ensure(after == before, f"{name_of(method)} changed the rows that it was given")


class Draws(Run):
    """A run that notes which seeds were drawn from."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.asked: list[tuple[torch.Generator, Tensor]] = []
        self.numbers: set[int] = set()

    def generator(self, *names: object) -> torch.Generator:
        found = super().generator(*names)
        self.asked.append((found, found.get_state()))
        return found

    def number(self, *names: object) -> int:
        found = super().number(*names)
        self.numbers.add(found)
        return found

    @property
    def drawn(self) -> set[int]:
        """The seeds of all draws that were made."""
        moved = {g.initial_seed() for g, start in self.asked if not torch.equal(g.get_state(), start)}
        return moved | self.numbers


def check_seeded(method: Any, material: Material) -> None:
    """The same seed gives the same bits, another one others, wherever the global random state stands and stays."""
    runs = [Draws(0), Draws(0), Draws(1)]
    found = []
    for state, run in enumerate(runs):
        with _global_state(state) as moved:
            found.append(outcome(method, material, run))
            ensure(not moved(), f"{name_of(method)} moved the global random state of {', '.join(moved())}")
    ensure(found[0] == found[1], f"{name_of(method)} gave other bits for the same seed, or drew from the global state")
    ensure(
        runs[0].drawn == runs[2].drawn or found[0] != found[2],
        f"{name_of(method)} draws from the run's seed, but another seed gave the same bits",
    )


@contextmanager
def _global_state(seed: int) -> Iterator[Callable[[], list[str]]]:
    """Plant the global random states, and put them back; yields which of them were moved."""
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    planted = _states()
    try:
        yield lambda: [name for name, state in _states().items() if state != planted[name]]
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])


def _states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (name, np.asarray(keys).tobytes(), *rest),
        "random": random.getstate(),
    }


class Fault(BaseException):
    """Stands for the end of the process."""


def check_resumes(method: Any, material: Material) -> None:
    """Killed before each entry of the journal, and started again each time, it ends with the same bits."""
    wanted = outcome(method, material, Run())
    with tempfile.TemporaryDirectory() as folder, _checkpoint_every_epoch():
        points = _stores(lambda: outcome(method, material, Run(Path(folder) / "whole")))
        for _ in range(points):
            with _fault_after(1):
                try:
                    outcome(method, material, Run(Path(folder) / "killed"))
                except Fault:
                    continue
                break
        found = outcome(method, material, Run(Path(folder) / "killed"))
    ensure(found == wanted, f"{name_of(method)} ended with other bits after {points} interruptions")


@contextmanager
def _checkpoint_every_epoch() -> Iterator[None]:
    with mock.patch.object(fitting, "CHECKPOINT_EVERY", -1.0), mock.patch.object(fitting, "WORTH_KEEPING", -1.0):
        yield


def _stores(act: Callable[[], object]) -> int:
    """How many entries a program journals."""
    with mock.patch.object(Journal, "store", autospec=True, side_effect=Journal.store) as store:
        act()
    return store.call_count


@contextmanager
def _fault_after(stores: int) -> Iterator[None]:
    """Let a program journal so many entries; at the next one it ends."""
    real, left = Journal.store, stores

    def store(self: Journal, *arguments: Any) -> None:
        nonlocal left
        if not left:
            raise Fault
        left -= 1
        real(self, *arguments)

    with mock.patch.object(Journal, "store", store):
        yield


# --- checks of learners


def check_prediction_is_of_the_row_alone(learner: Learner, material: Material) -> None:
    """A row alone is told the same as in a batch with others."""
    _row_alone(name_of(learner), learnt(learner, material.tasks, Run()).model, material.test)


def _row_alone(name: str, model: nn.Module, rows: Table) -> None:
    together, alone = predict(model, rows), predict(model, rows, batch_size=1)
    ensure(_close(together, alone, 1e-5), f"what {name}'s model says of a row depends on the other rows of the batch")


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Equal within a tolerance, relative above 1; infinite and missing values in the same places."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


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
            _close(found, wanted[:, : found.shape[1]], 1e-6),
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
            found[name] = _go_on(load_learner(place)[0], task)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _go_on(learner: Learner, task: Task) -> str:
    run = Run(seed=1)
    learner.learn(task, run)
    learner.refresh(run)
    return fingerprint(learner.state_dict())


def check_round_trip(learner: Learner, material: Material, found: str | None = None) -> None:
    """Saved, loaded in a fresh process and taught on, it ends with the same bits as without. `found`: what
    `after_round_trip` gave, where that was done for several learners at once."""
    name = name_of(learner)
    wanted = _go_on(learnt(learner, material.tasks[:1], Run()), material.tasks[1])
    found = found or after_round_trip({name: learner}, material)[name]
    ensure(found == wanted, f"{name} was saved, loaded and taught on, and became another ({found})")


# --- checks of forgetters


def check_model_is_untouched(method: Forgetter, material: Material) -> None:
    """The model that is handed over stays as it is, and shares no memory with the new one."""
    model = material.model()
    before = condition(model)
    new = method.forget(model, _complete(method, material), Run())
    name = name_of(method)
    ensure(condition(model) == before, f"{name} changed the model that it was given")
    places = {t.data_ptr() for t in model.state_dict().values() if t.numel()}
    shared = [key for key, t in new.state_dict().items() if t.numel() and t.data_ptr() in places]
    ensure(new is not model and not shared, f"{name}'s new model shares memory with the old one: {shared[:3]}")
    _row_alone(name, new, material.test)


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
    full, supplies = material.request, _supplies(method, material)
    unknown = needs - supplies.keys() - _ROWS.keys() - {Need.FORGET_LABELS, Need.RETAIN_LABELS}
    ensure(not unknown, f"the material cannot supply what {name_of(method)} needs: {', '.join(sorted(unknown))}")
    tables = {
        part: _supplied(getattr(full, part), need, _LABELS.get(need), needs, declared) for need, part in _ROWS.items()
    }
    poison = {need: _PoisonedThing(need) for need in supplies.keys() - declared}
    return full.but(**tables, at_hand={**poison, **{need: supplies[need] for need in supplies.keys() & needs}})


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
        request = Request.of_records(known, gone.ids).but(at_hand=_supplies(method, past))
        found.append(predict(method.forget(material.recipe(known, 0), request, Run()), material.test))
    ensure(
        _close(found[0], found[1], 1e-6),
        f"{name_of(method)} is declared exact, and its result depends on the forgotten rows",
    )


# --- checks of probes


def check_findings(probe: Probe, material: Material) -> None:
    """Findings are finite, with an interval around the value; the subject stays as it was."""
    subject = material.subject()
    before = condition(subject.model)
    findings = probe.examine(subject, Run())
    ensure(condition(subject.model) == before, f"{name_of(probe)} changed the model that it examined")
    ensure(bool(findings), f"{name_of(probe)} found nothing, with everything at hand")
    for finding in findings:
        low, high = finding.interval or (finding.value, finding.value)
        numbers = [
            finding.value,
            low,
            high,
            *finding.reference,
            *(p for curve in finding.curve.values() for p in curve),
        ]
        ensure(all(map(math.isfinite, numbers)), f"the finding {finding.name!r} of {name_of(probe)} is not finite")
        ensure(low <= finding.value <= high, f"the interval of {finding.name!r} does not hold the value")


def check_asks_are_honest(probe: Probe, material: Material) -> None:
    """What it asks for suffices, and it refuses a subject that lacks any of it."""
    full = material.subject()
    probe.check(_only(full, probe.asks))
    probe.examine(_only(full, probe.asks), Run())
    for part in probe.asks - {"model"}:
        try:
            probe.check(_only(full, probe.asks - {part}))
        except EngramError:
            continue
        raise AssertionError(f"{name_of(probe)} asks for {part}, and accepts a subject without")


def _only(subject: Subject, parts: frozenset[str]) -> Subject:
    """The subject with these parts alone."""
    kept = {name: getattr(subject, name) for name in ("before", "request", "forgetter", "learner") if name in parts}
    oracles = subject.models("oracle", 2, Run()) if "oracles" in parts else []
    rows = {name: table for name, table in subject.rows.items() if name in parts}
    recipe = subject.recipe if "recipe" in parts else None
    return Subject(subject.model, rows=rows, recipe=recipe, oracles=tuple(o.model for o in oracles), **kept)


# --- checks of protectors


def check_protected_rows(protector: Protector, material: Material) -> None:
    """Other inputs alone: ids, labels, names, other columns, shapes and types stay; images stay images, in memory of
    their own, whether they are stored as uint8 or as float; where it states `eps`, they change by no more than that."""
    for table in (material.train, _as_levels(material.train)):
        _keeps_the_rest(protector, table, fresh(protector).protect(table, Run()))


def _as_levels(table: Table) -> Table:
    """The table with float images as uint8."""
    inputs = {k: (v * 255).round().to(torch.uint8) if k == "pixel_values" else v for k, v in table.inputs.items()}
    return dataclasses.replace(table, inputs=inputs)


def _keeps_the_rest(protector: Protector, table: Table, found: Table) -> None:
    name = name_of(protector)
    for part in ("ids", "names", "shapes"):
        ensure(getattr(found, part) == getattr(table, part), f"{name} changed the {part} of the table")
    rest = [fingerprint({**contents(one), "inputs": {}}) for one in (table, found)]
    ensure(rest[0] == rest[1], f"{name} changed labels or other columns of the table")
    ensure(found.digest != table.digest, f"{name} changed nothing")
    for key, before in table.inputs.items():
        after = found.inputs[key]
        ensure(after.dtype == before.dtype, f"{name} made {after.dtype} of {key}, which was {before.dtype}")
        ensure(after.data_ptr() != before.data_ptr(), f"{name}'s {key} shares memory with that of the table")
        _keeps_the_range(protector, key, before, after)


def _keeps_the_range(protector: Protector, key: str, before: Tensor, after: Tensor) -> None:
    whole = 255 if before.dtype == torch.uint8 else 1
    one, other = before.double() / whole, after.double() / whole
    if key == "pixel_values":
        ensure(bool(((other >= 0) & (other <= 1)).all()), f"{name_of(protector)} made pixels outside the range")
    eps = getattr(protector, "eps", math.inf)
    most = float((one - other).abs().max())
    ensure(most <= eps + 1e-7, f"{name_of(protector)} changed {key} by {most:.6g}, and states eps={eps:.6g}")


# --- the catalogue's rows


def check_row(row: Method) -> None:
    """The needs of a row of the catalogue are those of its class, by default and at each setting that it names."""
    wanted = dict([("", row.needs), *row.variants])
    for setting, needs in wanted.items():
        found = {frozenset(map(str, one)) for one in _needs_of(row, setting)}
        ensure(found == set(needs), f"the catalogue says that {row.name} {setting} needs {needs}, and it needs {found}")
    cls = type(make(row.name))
    ensure(row.exact == getattr(cls, "exact", False), f"the catalogue and {row.name} disagree about exactness")


def _needs_of(row: Method, setting: str) -> Needs | list[frozenset[str]]:
    import yaml

    key, _, value = setting.partition("=")
    method = make({"name": row.name, **({key: yaml.safe_load(value)} if setting else {})})
    return [method.asks] if isinstance(method, Probe) else method.needs


# --- which checks for which method

Check = Callable[[Any, Material], None]
EVERY: tuple[Check, ...] = (check_config, check_untouched, check_seeded, check_resumes)
LEARNER: tuple[Check, ...] = (
    check_prediction_is_of_the_row_alone,
    check_looking_changes_nothing,
    check_learner_needs_are_honest,
    check_traces_are_complete,
    check_forgetting_is_exact,
    check_round_trip,
)
FORGETTER: tuple[Check, ...] = (check_model_is_untouched, check_forgetter_needs_are_honest, check_forgetter_is_exact)
PROBE: tuple[Check, ...] = (check_findings, check_asks_are_honest)
PROTECTOR: tuple[Check, ...] = (check_protected_rows,)


def checks_of(method: Any) -> tuple[Check, ...]:
    """The checks that a method of its kind has to pass."""
    kinds: Mapping[type, tuple[Check, ...]] = {
        Learner: LEARNER,
        Forgetter: FORGETTER,
        Probe: PROBE,
        Protector: PROTECTOR,
    }
    return (*EVERY, *(check for kind, own in kinds.items() if isinstance(method, kind) for check in own))
